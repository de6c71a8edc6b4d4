"""One run is one YAML file plus `key.sub=value` words, typed and checked by the dataclasses that own the sections.

A file may build on another by `base: other.yaml`. The string under a dataclass field is its help.
"""

import ast
import difflib
import inspect
import textwrap
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from flywheel_fast.errors import BadInput

SHIPPED = Path(__file__).parent / "configs"
T = TypeVar("T")


def shipped() -> dict[str, Path]:
    """The configs that come with the package: name -> file."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find(name: str) -> Path:
    """A config by path, or by the name of a shipped one (`digits`, `configs/digits.yaml` from any folder)."""
    path = Path(name)
    if path.is_file():
        return path
    if path.parent in (Path("."), Path("configs")) and path.stem in shipped():
        return shipped()[path.stem]
    near = difflib.get_close_matches(path.stem, shipped(), n=1) or ["digits"]
    raise BadInput(
        f"config {name!r} is neither a file nor a shipped config; nearest: {near[0]} (`config ls` lists all)"
    )


def load(schema: type[T], name: str | None, overrides: list[str] = ()) -> T:
    """Defaults of `schema`, then the file, then the overrides.

    Raises BadInput naming the key, the file (or the override) and the nearest valid key.
    """
    config = _defaults(schema)  # `merge` leaves it as it is
    for path, content in _read(find(name)) if name else []:
        config = _merge(schema, config, content, f"{path}")
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise BadInput(f"{word!r} is not of the form key=value, for example optim.lr=0.1")
        try:
            content = OmegaConf.from_dotlist([word])
        except yaml.YAMLError as error:
            raise BadInput(f"{word!r}: the value is not valid YAML ({_first_line(error)})") from error
        config = _merge(schema, config, content, "the command line")
    try:
        return OmegaConf.to_object(config)
    except (OmegaConfBaseException, ValueError) as error:  # a combination that __post_init__ refuses
        raise BadInput(f"{name or 'defaults'}: {_first_line(error)}") from error


def parse(schema: type[T], text: str, where: str) -> T:
    """A config that `dump` wrote; `where` it stands opens the message of BadInput."""
    try:
        return OmegaConf.to_object(_merge(schema, OmegaConf.structured(schema), OmegaConf.create(text), where))
    except (OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{where}: holds no config ({_first_line(error)})") from error


def dump(config: Any, comments: bool = False) -> str:
    """The resolved config as YAML, each field under its help where `comments` is set."""
    if not comments:
        return OmegaConf.to_yaml(OmegaConf.structured(config))
    return "\n".join(_commented(config, ""))


def difference(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two resolved configs, in order."""
    keys = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += difference(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys


def as_dict(config: Any) -> dict:
    return OmegaConf.to_container(OmegaConf.structured(config))


def flat(config: dict, prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text, of a resolved config."""
    found = {}
    for key, value in config.items():
        inner = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": str(value)}
    return found


@cache
def help_of(schema: type) -> dict[str, str]:
    """Field name -> the string that stands under it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def keys_of(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of a schema."""
    keys = []
    for field in fields(schema):
        keys.append(f"{prefix}{field.name}")
        if is_dataclass(field.type):
            keys += keys_of(field.type, f"{prefix}{field.name}.")
    return keys


@cache
def _defaults(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, DictConfig]]:
    """The file and those it builds on, base first."""
    if path.resolve() in seen:
        raise BadInput(f"{path}: `base` leads back to this file; remove one of the two")
    try:
        content = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise BadInput(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, DictConfig):
        raise BadInput(f"{path}: the file must hold `key: value` lines, not a {type(content).__name__}")
    base = content.pop("base", None)
    if base is None:
        return [(path, content)]
    if not (path.parent / str(base)).is_file():
        raise BadInput(f"{path}: `base: {base}` is not a file beside it")
    return [*_read(path.parent / base, (*seen, path.resolve())), (path, content)]


def _merge(schema: type, config: DictConfig, content: DictConfig, where: str) -> DictConfig:
    try:
        return OmegaConf.merge(config, content)
    except ConfigKeyError as error:
        near = difflib.get_close_matches(error.full_key or "", keys_of(schema), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "`flywheel-fast config show` lists the keys"
        raise BadInput(f"{where}: unknown key {error.full_key!r}; {hint}") from error
    except OmegaConfBaseException as error:
        flat = [key for key in content if OmegaConf.is_dict(config.get(key)) and not OmegaConf.is_dict(content[key])]
        raise BadInput(f"{where}: {error.full_key or ', '.join(flat)}: {_first_line(error)}") from error


def _commented(config: Any, indent: str) -> list[str]:
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        text = help_of(type(config)).get(field.name, "")
        lines += textwrap.wrap(text, 110 - len(indent), initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if is_dataclass(value):
            lines += [f"{indent}{field.name}:", *_commented(value, indent + "  ")]
        else:
            plain = {field.name: list(value) if isinstance(value, tuple) else value}
            block = yaml.safe_dump(plain, allow_unicode=True, width=10_000)
            lines += [indent + line for line in block.rstrip().splitlines()]
    return lines


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
