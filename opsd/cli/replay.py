"""`opsd replay`: runs the samples of a failed step again, to find what was not finite."""

import argparse


def run(parsed: argparse.Namespace) -> None:
    """Replays each sample and shows its numbers. Raises UserError."""
    from opsd.common.display import Display
    from opsd.common.errors import UserError

    if not (path := parsed.file).is_file():  # said before torch is imported
        kept = sorted((path if path.is_dir() else path.parent).glob("failed-step-*.pt"))
        hint = " without failed-step-N.pt" * path.is_dir() + " (a step that fails leaves one)"
        hint = f"; did you mean {str(kept[-1])!r}?" if kept else hint
        said = "a directory" if path.is_dir() else "no such file"
        raise UserError(f"FILE is {str(path)!r}: {said}{hint}")
    from opsd.models.load import quiet_transformers
    from opsd.training.replay import replay

    quiet_transformers()
    replay(parsed.file, Display(), parsed.trust_remote_code, parsed.ask_teacher)
