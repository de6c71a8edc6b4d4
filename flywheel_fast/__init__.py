"""flywheel-fast: train on badly labelled images, and learn which labels are wrong.

    import flywheel_fast as ff
    run = ff.train(images, labels)      # or a folder, a table, a torchvision data set
    run.issues()                        # a row an image: label_score, suggested_label, ...

Torch and the rest are imported when one of these names is first used.
"""

__version__ = "0.1.0"
__all__ = ["Run", "train"]


def __getattr__(name: str):
    if name in __all__:
        from flywheel_fast import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
