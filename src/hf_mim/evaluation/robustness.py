"""Test sets whose classes are some of a model's: ImageNet-A, -R, -Sketch, ObjectNet, and the like."""

import re
from collections.abc import Sequence

_WNID = re.compile(r"n\d{8}")


def match_classes(names: Sequence[str], label_names: Sequence[str]) -> list[int]:
    """
    Which of a model's labels each class of a test set is.

    Equal are names that differ in case, spaces, hyphens and underscores only; a label may list synonyms ("tench, Tinca
    tinca"). WordNet ids ("n01440764") are also understood where the labels are ImageNet-1K's names, by timm's tables.

    Args:
        names (`Sequence[str]`): Of the test set's classes.
        label_names (`Sequence[str]`): Of the model's labels.

    Returns:
        `list[int]`: a label for each name.

    Raises:
        ValueError: If a name is none of the labels, could be several, or two names are the same label.
    """
    places: dict[str, set[int]] = {}
    for label, text in enumerate(label_names):
        for name in {text, *text.split(",")}:
            places.setdefault(_plain(name), set()).add(label)
    if all(_WNID.fullmatch(name) for name in names) and not any(_plain(name) in places for name in names):
        places = _imagenet_places(label_names)
    found = [sorted(places.get(_plain(name), ())) for name in names]
    unknown = [name for name, labels in zip(names, found, strict=True) if not labels]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(names)} classes are no labels of the model: {', '.join(unknown[:5])}. It has, "
            f"for example, {', '.join(list(label_names)[:5])}. Name the folders by the model's labels."
        )
    for name, labels in zip(names, found, strict=True):
        if len(labels) > 1:
            raise ValueError(
                f"The class {name} could be the labels {labels} of the model. Name it by the whole label."
            )
    matched = [labels[0] for labels in found]
    if len(set(matched)) < len(matched):
        twice = [name for name, label in zip(names, matched, strict=True) if matched.count(label) > 1]
        raise ValueError(f"The classes {', '.join(twice)} are the same label of the model. Keep one.")
    return matched


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-]+", " ", name).strip().casefold()


def _imagenet_places(label_names: Sequence[str]) -> dict[str, set[int]]:
    """WordNet ids of ImageNet-1K's classes, if the labels are these, in their order."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    if len(label_names) != info.num_classes():
        return {}
    firsts = [_plain(info.index_to_description(label).split(",")[0]) for label in range(info.num_classes())]
    agree = sum(first == _plain(text.split(",")[0]) for first, text in zip(firsts, label_names, strict=True))
    if agree < 0.9 * len(firsts):
        return {}
    return {name: {label} for label, name in enumerate(info.label_names())}
