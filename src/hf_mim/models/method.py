"""What hf_mim has to know of a method, besides its classes: one record in each method's folder."""

from dataclasses import dataclass, field

# Sizes of networks by name; see `presets`.
PRESETS = ("tiny", "mini", "small", "base", "large", "huge")


@dataclass(frozen=True)
class FrozenPart:
    """
    A trained network that a method learns from.

    Args:
        name (`str`): Of the sub-module. Its flag is `--NAME_model_name_or_path`, its config's fields begin with it.
        optional (`bool`): Whether training may begin without one.
    """

    name: str
    optional: bool


@dataclass(frozen=True, kw_only=True)
class Method:
    """
    Read by the registry, presets, the building of models, flags and cards.

    Args:
        model_type (`str`): Of its configs, and the name of its folder.
        prefix (`str`): With which the names of its classes begin.
        name (`str`): As its paper writes it.
        paper (`str`): Authors, title, venue and year, for cards.
        citation (`str`): The paper in BibTeX, for cards.
        presets (`dict`): By preset, the fields of its config that differ from the config's defaults besides the
            encoder's sizes.
        schedules (`dict`): By preset, the training arguments that differ from those of all methods.
        frozen (`FrozenPart`, *optional*): The trained network that it learns from.
        is_baseline (`bool`): Whether it is saved under a model_type of transformers, whose classes stay as they are.
        stock_hides (`bool`): Whether transformers' encoder of that model_type hides patches even when it is used.
        release_license (`str`): Of the weights that its authors released, as the Hub names it.
        package (`str`): Where its folder is.

    Raises:
        ValueError: If a preset is unknown, or a text is empty.
    """

    model_type: str
    prefix: str
    name: str
    paper: str
    citation: str
    presets: dict[str, dict]
    schedules: dict[str, dict]
    frozen: FrozenPart | None
    is_baseline: bool = False
    stock_hides: bool = False
    release_license: str = "unknown"
    package: str = field(default="hf_mim.models")

    def __post_init__(self):
        for name in ("model_type", "prefix", "name", "paper", "citation"):
            if not getattr(self, name):
                raise ValueError(f"The method {self.model_type!r} has no {name}.")
        unknown = sorted({*self.presets, *self.schedules} - set(PRESETS))
        if unknown:
            raise ValueError(
                f"The method {self.model_type!r} has presets {', '.join(unknown)}; expected {', '.join(PRESETS)}."
            )
