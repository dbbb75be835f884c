"""Would Weights & Biases take a run? The key itself is never shown."""

from __future__ import annotations

import os
import threading

from tools.doctor.finding import Finding, fail, ok, warn
from tools.doctor.settings import section


def wandb() -> Finding:
    """The mode that stages would use, and for `online` what the server says to the key."""
    from stages.core.runtime import cache_dir
    from stages.core.wandb_access import prepare_environment, unreachable

    mode, folder = section("wandb").mode, cache_dir(section("runtime"))
    origin = "WANDB_MODE" if os.environ.get("WANDB_MODE") else "wandb.mode of params.yaml"
    if mode != "online":
        kept = f", kept in {folder}/wandb until `wandb sync`" if mode == "offline" else ""
        return ok(f"{mode} by {origin}{kept}")
    before = dict(os.environ)
    try:
        prepare_environment(folder)
        wrong = unreachable(threading.Event())
    finally:
        os.environ.clear()
        os.environ |= before
    if wrong is None:
        return ok(f"online by {origin}, and W&B takes the key")
    if "key" in wrong:
        return fail(wrong.split(": ")[0], "wandb login (or a line WANDB_API_KEY=... in .env)")
    return warn(f"{wrong}: runs are kept on this disk", "export WANDB_MODE=offline, and `wandb sync` later")
