"""`opsd serve-teacher`: serves a teacher over HTTP, to score the rollouts of other processes."""

import argparse

from opsd.common.errors import UserError

HERE = ("127.0.0.1", "::1", "localhost")


def run(parsed: argparse.Namespace) -> None:
    """Serves the model until interrupted. Raises UserError."""
    from opsd.cli.first_look import check_model, import_torch
    from opsd.common.display import Display
    from opsd.common.http import key_in

    check_model(parsed.model, "MODEL", hub=True)
    from opsd.models.remote import KEY

    key = key_in(KEY)
    if key is None and parsed.host not in HERE:
        danger = "whoever reaches it could ask for the model's states and head"
        mend = f"set a key in {KEY}, here and where the run is"
        raise UserError(f"--host is {parsed.host!r}: {danger}; {mend}")
    display = Display()
    import_torch(display)
    import torch

    from opsd.config.sections import ModelSection
    from opsd.models.load import load_model
    from opsd.prefix.state_server import StateServer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if parsed.dtype == "fp32" else torch.bfloat16
    with display.stage(f"Load {parsed.model}"):
        section = ModelSection(path=parsed.model)
        model, tokenizer = load_model(section, device, dtype=dtype, name="MODEL")
    try:
        server = StateServer((parsed.host, parsed.port), model, tokenizer, key, parsed.most_tokens)
    except OSError as error:
        mend = "name this machine's own address, and a free port above 1023 (0 takes any)"
        why = f"{error.strerror or error}; {mend}"
        raise UserError(f"--host is {parsed.host!r}, --port is {parsed.port}: {why}") from None
    with server:
        host = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
        place = f"http://{host}:{server.server_port}"
        display.note(f"Serving {server.about.weights[:12]} at {place}: teacher.path: {place}")
        server.serve_forever()
