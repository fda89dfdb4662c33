"""Fields of a config as the command line has them."""

import json


def parse_overrides(text: str | None) -> dict:
    """`"a=1,b=[2,3],c=mean"` or a JSON object as a dictionary; values are read as JSON where they are JSON."""
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"--config_overrides is {text!r}, which is not JSON: {error}.") from error
    overrides: dict = {}
    name = None
    for part in text.split(","):
        if "=" in part:
            name, _, value = part.partition("=")
            overrides[name.strip()] = value
        elif name is not None:
            # A comma inside a list.
            overrides[name.strip()] += "," + part
        else:
            raise ValueError(f"--config_overrides is {text!r}; expected name=value, separated by commas.")
    return {name: _read_value(value) for name, value in overrides.items()}


def _read_value(text: str):
    text = text.strip()
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text
