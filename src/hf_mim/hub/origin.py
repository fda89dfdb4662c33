"""What a run was made of, as a card's metadata tells it: weights that it began from, their licence, data sets."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError

# A name on the Hub; those of its first models have no owner.
_ON_THE_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# What the owners of a licence that they wrote themselves, or that forbids to sell, would not want to be forgotten.
_RESTRICTED = re.compile(r".*-nc(-.*)?|other|.*research.*|openrail.*|llama.*|unknown")


@dataclass
class Origin:
    """
    Args:
        base_models (`list[str]`): Models of the Hub that it was made of.
        datasets (`list[str]`): Data sets of the Hub.
        license (`str`, *optional*): As the Hub names it.
        restricted (`list[str]`): For each of the weights it was made of that come under terms of their own, a
            sentence.
    """

    base_models: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    license: str | None = None
    restricted: list[str] = field(default_factory=list)


def read_origin(*weights: str | None, dataset_name: str | None = None, license: str | None = None) -> Origin:
    """
    Args:
        weights (`str`, *optional*): What was begun from or learnt from: folders, whose cards tell where they are from,
            names on the Hub, or "untrained".
        dataset_name (`str`, *optional*): As the flag.
        license (`str`, *optional*): Default: the one licence of the weights, where their cards say it.
    """
    origin, licenses = Origin(), []
    for path in dict.fromkeys(path for path in weights if path not in (None, "untrained")):
        is_local = Path(path).expanduser().exists()
        if not is_local and _ON_THE_HUB.fullmatch(path):
            origin.base_models.append(path)
        card = _card_of(path, is_local)
        if card is None:
            continue
        if is_local:
            given = card.get("base_model", [])
            origin.base_models += [given] if isinstance(given, str) else given
        found = card.get("license")
        found = found if isinstance(found, str) else None
        licenses += [] if found is None else [found]
        if found is not None and is_restricted(found):
            origin.restricted.append(restriction(path, found))
    origin.base_models = list(dict.fromkeys(origin.base_models))
    if dataset_name and _ON_THE_HUB.fullmatch(dataset_name) and not Path(dataset_name).exists():
        origin.datasets = [dataset_name]
    origin.license = license or (licenses[0] if len(set(licenses)) == 1 else None)
    return origin


def is_restricted(license: str) -> bool:
    """Whether a licence asks for more than to be named."""
    return _RESTRICTED.fullmatch(license) is not None


def restriction(path: str, license: str) -> str:
    """What is to be said of weights under a licence of their own."""
    if license == "unknown":
        return f"The licence of {path} is not known here: look into the release before you use or share this."
    forbids = "which forbids commercial use" if "-nc" in license else "whose terms go on to hold"
    return f"{path} is under {license}, {forbids}: so are weights that are made of it, these among them."


def _card_of(path: str, is_local: bool):
    """The metadata of a card; None where there is none, or it cannot be had."""
    try:
        if is_local:
            folder = Path(path).expanduser()
            return ModelCard.load(folder / "README.md").data if (folder / "README.md").is_file() else None
        return ModelCard.load(path).data
    except (OSError, ValueError, HTTPError):
        return None
