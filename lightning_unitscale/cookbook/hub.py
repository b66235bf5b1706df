"""Whether the Hugging Face hub can be asked at all: known in seconds, where its own client tries for half a minute."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_session, try_to_load_from_cache

from lightning_unitscale.errors import InputError, first_line
from lightning_unitscale.near_names import not_found

SECONDS = 5.0  # for one answer of any kind


def check_reachable(key: str, name: str, file: str) -> None:
    """Nothing is asked for what lies here, or where HF_HUB_OFFLINE=1 says that the network is not to be tried.

    Args:
        key: the setting that names it.
        name: a path, or a name on the hub.
        file: one that it must have; is it in the client's cache, so is the rest.

    Raises:
        InputError: it is not here, and the hub does not answer.
    """
    if Path(name).exists() or constants.HF_HUB_OFFLINE:
        return
    try:
        cached = isinstance(try_to_load_from_cache(name, file), str)
    except ValueError:  # not a name that the hub can have, which its client says
        return
    if cached:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of httpx or of requests, by the client's version
        raise InputError(
            f"{key}={name}: the Hugging Face hub can't be reached ({first_line(error)}), and here there is "
            f"{not_found(name)}"
        ) from error
