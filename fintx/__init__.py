"""fintx: does a bigger transformer predict markets better, and at a fixed parameter budget which shape wins?"""

__version__ = "0.1.0"
