"""Names of splits, as people write them, and which split is trained on and which is held out."""

import os

TRAINING = ("train", "training")
# The first that is there is held out.
HELD_OUT = ("validation", "valid", "val", "dev", "test")


def is_split(name: str) -> bool:
    return name.lower() in TRAINING + HELD_OUT


def find_split(names, wanted: str | None, known: tuple[str, ...] = ()) -> str | None:
    """The name that is `wanted`; where none is, the first that says the same in other words or another case.

    Args:
        names: of the splits that are there.
        wanted (`str`, *optional*): as the flag has it.
        known: what to look for where nothing is wanted, the best first.
    """
    if wanted in names:
        return wanted
    if wanted is not None:
        known = next((kind for kind in (TRAINING, ("validation", "valid", "val", "dev")) if wanted in kind), (wanted,))
    for word in known:
        for name in names:
            if name.lower() == word.lower():
                return name
    return None


def choose_splits(names, source: str, train_split: str, validation_split: str | None) -> tuple[str, str | None]:
    """The names of the split to train on, and of the one to hold out (None where there is none).

    Raises:
        ValueError: a split that is asked for is not there, or there is none to train on.
    """
    train = find_split(names, train_split)
    if train is None:
        hint = f" To train on it: --train_split {names[0]}." if len(names) == 1 else ""
        raise ValueError(f"--train_split {train_split}: {source} has the splits {', '.join(names)}.{hint}")
    others = [name for name in names if name != train]
    held_out = find_split(others, validation_split, HELD_OUT)
    if validation_split is not None and held_out is None:
        raise ValueError(f"--validation_split {validation_split}: {source} has the splits {', '.join(names)}.")
    return train, held_out


def folder_splits(root: str) -> dict[str, str] | None:
    """The folders of a root's splits (`train/`, `val/`, ...) by name, or None where it has no such folders.

    A folder alone in the root is gone into (`root/images/train`). Folders of other names beside those of splits are
    classes: of a data set with a class "test" or "train".

    Raises:
        ValueError: there are folders for training and for evaluation, and others beside them: it cannot be told
            whether these names are splits or classes.
    """
    while True:
        with os.scandir(root) as scan:
            entries = [entry for entry in scan if not entry.name.startswith(".")]
        names = sorted(entry.name for entry in entries if entry.is_dir())
        splits = [name for name in names if is_split(name)]
        if not splits and len(names) == len(entries) == 1:
            root = os.path.join(root, names[0])
            continue
        break
    if len(splits) == len(names) and splits:
        return {name: os.path.join(root, name) for name in splits}
    if find_split(splits, "train") and find_split(splits, None, HELD_OUT):
        others = [name for name in names if name not in splits]
        more = ", ..." if len(others) > 3 else ""
        raise ValueError(
            f"{root} holds {', '.join(splits)} and also {', '.join(others[:3])}{more}: are these splits or classes? "
            f"If splits: --train_dir {os.path.join(root, find_split(splits, 'train'))}. If classes: give "
            f"{', '.join(splits)} other names."
        )
    return None


def sibling_split(folder: str, validation_split: str | None) -> str | None:
    """The folder beside `.../train` that holds the pictures to hold out, where there is one."""
    parent, name = os.path.split(os.path.abspath(folder))
    if name.lower() not in TRAINING:
        return None
    with os.scandir(parent) as scan:
        names = sorted(entry.name for entry in scan if entry.is_dir() and is_split(entry.name))
    held_out = find_split([other for other in names if other != name], validation_split, HELD_OUT)
    return None if held_out is None else os.path.join(parent, held_out)
