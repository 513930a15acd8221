"""`opsd replay`: runs the samples of a failed step again, to find what was not finite."""

import argparse


def run(parsed: argparse.Namespace) -> None:
    """Replays each sample and shows its numbers. Raises UserError."""
    from opsd.common.display import Display
    from opsd.common.errors import UserError

    if not (path := parsed.file).is_file():  # said before torch is imported
        kept = sorted((path if path.is_dir() else path.parent).glob("failed-step-*.pt"))
        hint = f"; did you mean {str(kept[-1])!r}?" if kept else " (a step that fails leaves one)"
        said = "a directory without failed-step-N.pt" if path.is_dir() else "no such file"
        said = "a directory" if kept and path.is_dir() else said
        raise UserError(f"FILE is {str(path)!r}: {said}{hint}")
    from opsd.models.load import quiet_transformers
    from opsd.training.replay import replay

    quiet_transformers()
    replay(parsed.file, Display(), parsed.trust_remote_code, parsed.ask_teacher)
