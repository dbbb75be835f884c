"""Whether W&B would take a run now: where the key comes from, and a first question with a short patience.

`wandb` is imported in functions, because the doctor, which runs without any package, asks, too.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from contextlib import suppress
from pathlib import Path

SECONDS_TO_ANSWER = 3.0  # that W&B has for its first answer, and for opening a run
_SECONDS_AFTER_END = 0.5  # and for the first answer, when the stage has ended already
_SET_KEY = "set WANDB_API_KEY in the environment or in .env"


def prepare_environment(cache_dir: Path) -> str | None:
    """Set what wandb reads from the environment, the key among it, which is returned."""
    from dotenv import dotenv_values

    here = Path.cwd()
    # `dvc exp run --temp` and the queue work in <repository>/.dvc/tmp/exps/NAME, and take no untracked files there.
    repository = next((parent.parent for parent in here.parents if parent.name == ".dvc"), here)
    key = os.environ.get("WANDB_API_KEY") or dotenv_values(repository / ".env").get("WANDB_API_KEY")
    if key:
        os.environ["WANDB_API_KEY"] = key
    folder = cache_dir / "wandb"
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RUN_GROUP", "WANDB_SWEEP_ID"):
        os.environ.pop(name, None)  # the stage decides
    # Artifacts wait there until they are sent.
    os.environ |= {"WANDB_DATA_DIR": str(folder / "data"), "WANDB_CACHE_DIR": str(folder / "cache")}
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    return key


def unreachable(ended: threading.Event) -> str | None:
    """Ask W&B who we are: why it would take no run now, or None. wandb itself would try for up to 90 seconds.

    When the stage has `ended`, patience does too: a run must reach the disk in what is left of its waiting time.
    """
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    url, key = settings.base_url.rstrip("/"), settings.api_key
    if settings.identity_token_file is not None:
        return None
    if not key and get_netrc_auth(url) is None:
        return f"no key for W&B: {_SET_KEY}"
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    # In a thread, because no timeout of a socket covers names that do not resolve and answers that trickle.
    threading.Thread(target=lambda: answers.put(_ask(url, key)), daemon=True).start()
    last = time.monotonic() + SECONDS_TO_ANSWER
    while time.monotonic() < last:
        with suppress(queue.Empty):
            return answers.get(timeout=0.05)
        if ended.is_set():
            last = min(last, time.monotonic() + _SECONDS_AFTER_END)
            ended = threading.Event()
    return f"W&B ({url}) does not answer within {SECONDS_TO_ANSWER:g} s"


def _ask(url: str, key: str | None) -> str | None:
    """What is wrong with W&B's answer to a key; without one, requests takes that of ~/.netrc."""
    import requests

    auth = ("api", key) if key else None
    try:
        response = requests.post(
            f"{url}/graphql", json={"query": "query { viewer { id } }"}, auth=auth, timeout=SECONDS_TO_ANSWER
        )
        if response.status_code in (401, 403):
            return f"W&B ({url}) refuses the key: {_SET_KEY}"
        if response.status_code != 200:
            return f"W&B ({url}) answers with status {response.status_code}"
        if not (response.json().get("data") or {}).get("viewer"):
            return f"W&B ({url}) does not know the key: {_SET_KEY}"
    except requests.ReadTimeout:
        return f"W&B ({url}) does not answer within {SECONDS_TO_ANSWER:g} s"
    except (requests.RequestException, ValueError) as error:
        return f"W&B ({url}) cannot be reached ({type(error).__name__})"
    return None
