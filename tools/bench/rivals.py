"""The rivals: the same architecture written plainly in PyTorch, and Hugging Face's PatchTST set alike.

Run by drive.py with the rivals' own Python (README.md); needs torch, transformers, numpy and nothing of fintx.

eager: attention written out, torch.optim.AdamW as it comes. sdpa: torch's fused attention and fused AdamW.
compile: torch.compile over the model of sdpa, fused AdamW; on a GPU in the mode that replays the model as a CUDA graph
("reduce-overhead"). graph: torch.compile over a block, and on a GPU the whole step as one CUDA graph, clip and AdamW
too: the fastest that PyTorch has where kernels are many and small. huggingface: PatchTSTModel; a window is handed to it
as one channel of T × F numbers, so that its patches are ours; it has three projections for our one, and no final norm.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from turns import keep_to_cores, serve, timed

N_THREADS = keep_to_cores()

import cases  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

torch.set_num_threads(N_THREADS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32, as JAX multiplies float32 there by itself


class Block(nn.Module):
    """Pre-norm attention and feed-forward, dropout where fintx has it."""

    def __init__(self, case: cases.Case):
        super().__init__()
        d, self.n_heads, self.rate = case.d_model, case.n_heads, case.dropout
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.attention_out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed_forward_in, self.feed_forward_out = nn.Linear(d, case.d_ff), nn.Linear(case.d_ff, d)
        self.dropout = nn.Dropout(case.dropout)

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, N, 3, self.n_heads, D // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if fused:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0)
        else:
            weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
            mixed = self.dropout(weights) @ v
        x = x + self.dropout(self.attention_out(mixed.transpose(1, 2).reshape(B, N, D)))
        active = self.dropout(F.gelu(self.feed_forward_in(self.feed_forward_norm(x))))
        return x + self.dropout(self.feed_forward_out(active))


class Model(nn.Module):
    """window (B, T, F) → logit (B,)."""

    def __init__(self, case: cases.Case):
        super().__init__()
        d = case.d_model
        self.embedding = nn.Linear(cases.PATCH * cases.N_FEATURES, d)
        self.positions = nn.Parameter(0.02 * torch.randn(cases.N_PATCHES, d))
        self.blocks = nn.ModuleList(Block(case) for _ in range(case.n_layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(cases.N_PATCHES * d, 1)
        self.dropout = nn.Dropout(case.dropout)

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        # (B, N, F, P) → (B, N, P · F)
        patches = x.unfold(1, cases.PATCH, cases.STRIDE).transpose(2, 3).flatten(2)
        x = self.dropout(self.embedding(patches) + self.positions)
        for block in self.blocks:
            x = block(x, fused)
        return self.head(self.norm(x).flatten(1))[:, 0]


class HuggingFace(nn.Module):
    """PatchTSTModel and a linear head."""

    def __init__(self, case: cases.Case):
        super().__init__()
        from transformers import PatchTSTConfig, PatchTSTModel

        rate, width = case.dropout, cases.N_FEATURES
        self.body = PatchTSTModel(
            PatchTSTConfig(
                num_input_channels=1, context_length=cases.CONTEXT * width, patch_length=cases.PATCH * width,
                patch_stride=cases.STRIDE * width, num_hidden_layers=case.n_layers, d_model=case.d_model,
                num_attention_heads=case.n_heads, ffn_dim=case.d_ff, norm_type="layernorm", pre_norm=True,
                attention_dropout=rate, positional_dropout=rate, path_dropout=rate, ff_dropout=rate,
                positional_encoding_type="random", scaling=None, do_mask_input=False,
            )
        )  # fmt: skip
        self.head = nn.Linear(cases.N_PATCHES * case.d_model, 1)

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        hidden = self.body(past_values=x.flatten(1)[..., None]).last_hidden_state
        return self.head(hidden.flatten(1))[:, 0]


class Windows(Dataset):
    """As one writes it: a window is cut when it is asked for."""

    def __init__(self, features: np.ndarray, labels: np.ndarray):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.features[i : i + cases.CONTEXT]), torch.tensor(self.labels[i])


class Rival:
    """One model under training."""

    def __init__(self, case: cases.Case, kind: str):
        torch.manual_seed(0)
        self.case, self.kind = case, kind
        self.model = (HuggingFace(case) if kind == "huggingface" else Model(case)).to(DEVICE).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=cases.LEARNING_RATE, weight_decay=cases.WEIGHT_DECAY, fused=kind != "eager",
            capturable=kind == "graph" and DEVICE == "cuda",
        )  # fmt: skip
        mode = "reduce-overhead" if DEVICE == "cuda" else None
        self.forward = torch.compile(self.model, mode=mode) if kind == "compile" else self.model
        if kind == "graph":
            for block in self.model.blocks:
                block.compile()
        features, labels = draw(case)
        n_train = case.n_windows - case.n_validation
        x = torch.from_numpy(features).unfold(0, cases.CONTEXT, 1).transpose(1, 2)
        starts = torch.randperm(n_train)[: case.steps * case.batch_size]
        size = (case.steps, case.batch_size)
        self.batches = list(zip(
            x[starts].contiguous().view(*size, cases.CONTEXT, -1).to(DEVICE),
            torch.from_numpy(labels)[starts].view(*size).to(DEVICE), strict=True,
        ))  # fmt: skip
        cut = n_train + cases.CONTEXT - 1
        self.train = DataLoader(Windows(features[:cut], labels[:n_train]), case.batch_size, shuffle=True)
        if case.n_validation:
            self.validation = DataLoader(Windows(features[n_train:], labels[n_train:]), 256)
        self.captured = self._capture() if kind == "graph" and DEVICE == "cuda" else None

    def _capture(self) -> tuple[Any, Tensor, Tensor, Tensor]:
        """The whole step as a CUDA graph, after steps on a stream of its own, as torch's documents ask; x, y, loss."""
        x, y = (each.clone() for each in self.batches[0])
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                self._step(x, y)
        torch.cuda.current_stream().wait_stream(beside)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._step(x, y)
        return graph, x, y, loss

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        if self.captured is None:
            return self._step(x, y)
        graph, held_x, held_y, loss = self.captured
        held_x.copy_(x)
        held_y.copy_(y)
        graph.replay()
        return loss

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        mixed = torch.autocast(DEVICE, torch.bfloat16) if self.case.dtype == "bfloat16" else contextlib.nullcontext()
        self.optimizer.zero_grad(set_to_none=True)
        with mixed:
            logits = self.forward(x, self.kind != "eager")
        loss = F.binary_cross_entropy_with_logits(logits.float(), y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), cases.CLIP_NORM)
        self.optimizer.step()
        return loss.detach()

    def turn(self) -> None:
        for x, y in self.batches:
            loss = self.step(x, y)
        loss.item()

    def epoch(self) -> None:
        """Train over the loader, then validate: what the loop of a plain PyTorch trial does in an epoch."""
        total = 0.0
        for x, y in self.train:
            total += self.step(x.to(DEVICE), y.to(DEVICE)).item()
        self.model.eval()
        with torch.no_grad():
            losses = [
                F.binary_cross_entropy_with_logits(self.forward(x.to(DEVICE), self.kind != "eager"), y.to(DEVICE))
                for x, y in self.validation
            ]
        torch.stack(losses).mean().item()
        self.model.train()


def draw(case: cases.Case) -> tuple[np.ndarray, np.ndarray]:
    """Noise, and labels that a model can learn."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((case.n_windows + cases.CONTEXT - 1, cases.N_FEATURES)).astype(np.float32)
    return features, (features[cases.CONTEXT - 1 :, 0] > 0).astype(np.float32)


class Rivals:
    """The orders that drive.py gives."""

    def __init__(self) -> None:
        self.held: dict[str, Rival] = {}

    def setup(self, case: dict[str, Any], kind: str) -> dict[str, Any]:
        began = time.perf_counter()
        rival = self.held[kind] = Rival(cases.Case(**case), kind)
        built = time.perf_counter()
        rival.step(*rival.batches[0]).item()
        n_params = sum(p.numel() for p in rival.model.parameters())
        return {"first_step_s": time.perf_counter() - built, "build_s": built - began, "n_params": n_params}

    def turn(self, kind: str) -> dict[str, Any]:
        return timed(self.held[kind].turn)

    def epoch(self, kind: str) -> dict[str, Any]:
        return timed(self.held[kind].epoch)

    def drop(self) -> dict[str, Any]:
        self.held.clear()
        torch.compiler.reset()
        return {}

    def about(self) -> dict[str, Any]:
        import transformers

        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": versions, "threads": torch.get_num_threads(), "device": device}


if __name__ == "__main__":
    rivals = Rivals()
    serve({name: getattr(rivals, name) for name in ("setup", "turn", "epoch", "drop", "about")})
