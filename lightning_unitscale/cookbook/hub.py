"""Whether the Hugging Face hub can be asked at all: known in seconds, where its own client tries for half a minute."""

from __future__ import annotations

from huggingface_hub import constants, get_session, try_to_load_from_cache

from lightning_unitscale.errors import InputError, first_line
from lightning_unitscale.near_names import may_be_hub_name, not_found

SECONDS = 5.0  # for one answer of any kind


def check_reachable(key: str, name: str, file: str | None) -> None:
    """Nothing is asked for what is no name on the hub, or where HF_HUB_OFFLINE=1 says not to try the network.

    Args:
        key: the setting that names it.
        name: a path, or a name on the hub.
        file: one that it must have; if that is in the client's cache, so is the rest. None: the hub is needed always.

    Raises:
        InputError: it is not here, and the hub does not answer.
    """
    if not may_be_hub_name(name) or constants.HF_HUB_OFFLINE:
        return
    try:
        cached = file is not None and isinstance(try_to_load_from_cache(name, file), str)
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
