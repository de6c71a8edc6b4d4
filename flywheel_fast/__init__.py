"""flywheel-fast: train on badly labelled images, and learn which labels are wrong."""

__version__ = "0.1.0"
