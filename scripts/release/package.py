"""Makes bundles ready to ship: a folder that needs nothing around it, its zip, and the lists of what was published."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from scripts.files import own_tree, sha256_of, written_aside

__all__ = ["needed_modules", "package", "package_all"]

FOLDERS = ("configs", "docs", "models", "baselines")
LARGE_FILES = ("large_files.json", "large_files.yaml", "large_files.yml")  # MONAI's names of the list of files to fetch
FILES = ("LICENSE", *LARGE_FILES)
GENERATED = (".ckpt", ".pyc")  # endings of what training and Python leave behind
KEPT = re.compile(r".*_files\.csv|.*\.pt\.[0-9a-f]{12}")  # records of what a training wrote, and what it replaced
MODULE_NAME = re.compile(r"(?<![\w.])scripts(?:[./]\w+)+")  # dotted, or a path


def package(bundle: Path, output_dir: Path) -> dict[str, object]:
    """Write a self-contained copy of a bundle, its zip and the zip's SHA-256, each whole or not at all.

    The folder ``output_dir/NAME`` holds the code that the configurations need in place of the link ``scripts``, so that it
    runs from any place. ``NAME_v<version>.zip`` holds that folder; ``sha256sum -c`` takes ``NAME_v<version>.zip.sha256``.
    The same files give the same bytes, whatever their times and on whatever machine.

    Args:
        bundle: folder of the bundle.
        output_dir: folder to write to, made if need be; an older package of the same name in it is
            replaced, if it is as it was written.

    Returns:
        name, version, folder, zip (paths), sha256 (of the zip), bytes (size of the zip) and modules (the code's files).

    Raises:
        ValueError: if the bundle's metadata, weights, code or links are not in order, or the output would replace a bundle.
        OSError: if the output can't be written.
    """
    bundle, output_dir = Path(bundle).resolve(), Path(output_dir).resolve()
    name, version = _name_and_version(bundle)
    target, archive = output_dir / name, output_dir / f"{name}_v{version}.zip"
    if output_dir == bundle or bundle in output_dir.parents:
        raise ValueError(f"{output_dir} is inside the bundle; write its package elsewhere")
    if target == bundle or target.is_symlink() or (target.exists() and not _is_package(target)):
        raise ValueError(f"{target} is no package made earlier and is not replaced; write to another folder")
    members = _members(bundle)
    try:
        with own_tree(target) as folder:
            for member, source in members.items():
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / member)
        with written_aside(archive) as path:
            _write_zip(path, {f"{name}/{member}": target / member for member in members})
        sha256 = sha256_of(archive)
        _write_text(archive.with_name(f"{archive.name}.sha256"), f"{sha256}  {archive.name}\n")
    except OSError as error:
        raise OSError(f"{output_dir}: the package can't be written: {error}") from error
    modules = [member for member in members if member.startswith("scripts/")]
    return {
        "name": name,
        "version": version,
        "folder": target,
        "zip": archive,
        "sha256": sha256,
        "bytes": archive.stat().st_size,
        "modules": modules,
    }


def package_all(bundles: list[Path], output_dir: Path, url_base: str = "") -> list[dict[str, object]]:
    """Package several bundles, and write the lists that the published folder needs.

    ``SHA256SUMS`` has a line for each zip, as ``sha256sum`` writes them. ``model_info.json`` has the form of MONAI's model
    zoo, ``{"NAME_v<version>": {"checksum": <SHA-1 of the zip>, "source": <address of the zip>}}``; MONAI 1.6.1 reads the
    keys and ``source`` from it, and checks no hash.

    Args:
        bundles: folders of the bundles.
        output_dir: folder to write to.
        url_base: address that the folder will be published under; without it a source is a zip's bare name.

    Returns:
        what :func:`package` returns, for each bundle.

    Raises:
        ValueError: if a bundle is not in order, or two have one name.
        OSError: if the output can't be written.
    """
    twice = [name for name, times in Counter(Path(bundle).resolve().name for bundle in bundles).items() if times > 1]
    if twice:
        raise ValueError(f"more than one bundle is named {', '.join(twice)}")
    packages = [package(bundle, output_dir) for bundle in bundles]
    base = url_base.rstrip("/") + "/" if url_base else ""
    info = {
        f"{done['name']}_v{done['version']}": {
            "checksum": hashlib.sha1(done["zip"].read_bytes(), usedforsecurity=False).hexdigest(),
            "source": base + done["zip"].name,
        }
        for done in packages
    }
    sums = sorted(f"{done['sha256']}  {done['zip'].name}\n" for done in packages)
    _write_text(Path(output_dir) / "SHA256SUMS", "".join(sums))
    _write_text(Path(output_dir) / "model_info.json", json.dumps(info, indent=4, sort_keys=True) + "\n")
    return packages


def own_modules(bundle: Path) -> list[Path]:
    """Python files beside the bundle's ``configs``, such as a network that is not in ``scripts``."""
    return sorted(bundle.glob("*.py"))


def needed_modules(bundle: Path) -> list[str]:
    """Files of the package ``scripts`` that the bundle's configurations and own modules need, or what these import.

    Raises:
        ValueError: if a configuration is no JSON, or names a module that is not there.
    """
    waiting: set[str] = set()
    for path in own_modules(bundle):
        waiting.update(_imported_modules(bundle, path, ""))
    for path in sorted((bundle / "configs").glob("*.json")):
        if path.name == "metadata.json":  # prose, which may well talk about the code
            continue
        for text in _strings(_read_json(path)):
            names = [name.replace("/", ".") for name in MODULE_NAME.findall(text)]
            names += list(_imports(text[1:], "", path)) if _is_import(text) else []
            for name in names:
                module = _module_file(bundle, name)
                if module is None:
                    raise ValueError(f"{path}: {name} is in no module of {bundle / 'scripts'}")
                waiting.add(module)
    found: set[str] = set()
    while waiting - found:
        module = min(waiting - found)
        found.add(module)
        path = bundle / module
        within = module.removesuffix(".py").replace("/", ".").rpartition(".")[0]
        waiting.update(_imported_modules(bundle, path, within))
    packages = {f"{parent}/__init__.py" for module in found for parent in Path(module).parents if parent != Path(".")}
    return sorted(found | packages)


def _name_and_version(bundle: Path) -> tuple[str, str]:
    meta = _read_json(bundle / "configs" / "metadata.json")
    if meta.get("name") != bundle.name:
        raise ValueError(f"{bundle}: metadata.json is named {meta.get('name')}, the folder {bundle.name}")
    version = str(meta.get("version"))
    if not re.fullmatch(r"\d+(\.\d+)*", version):
        raise ValueError(f"{bundle}: the version '{version}' in metadata.json is no number such as 0.1.0")
    weights = bundle / "models" / "model.pt"
    if weights.is_file():
        if sha256_of(weights) != meta.get("weights_sha256"):
            raise ValueError(f"{weights} is not the file whose weights_sha256 metadata.json states; correct one of them")
    elif not any((bundle / listed).is_file() for listed in LARGE_FILES):
        raise ValueError(f"{weights} is missing; train the bundle, or list it in large_files.json")
    return bundle.name, version


def _members(bundle: Path) -> dict[str, Path]:
    """Where each file of the package comes from, by its path in the package, sorted."""
    if not (bundle / "LICENSE").is_file():
        raise ValueError(f"{bundle / 'LICENSE'} is missing")
    if not (bundle / "scripts").is_dir():
        raise ValueError(f"{bundle / 'scripts'} is neither a folder nor a link to one; mend the link")
    members = [name for name in FILES if (bundle / name).is_file()] + [path.name for path in own_modules(bundle)]
    for path in (path for folder in FOLDERS for path in (bundle / folder).rglob("*")):
        member = path.relative_to(bundle)
        if (
            any(part.startswith((".", "__pycache__")) for part in member.parts)
            or path.suffix in GENERATED
            or KEPT.fullmatch(path.name)
        ):
            continue
        if path.is_symlink() and not path.is_file():
            raise ValueError(f"{path} is a link to no file; mend or remove it")
        if path.is_file():
            members.append(member.as_posix())
    return {member: bundle / member for member in sorted([*members, *needed_modules(bundle)])}


def _is_package(folder: Path) -> bool:
    scripts = folder / "scripts"
    return (folder / "configs" / "metadata.json").is_file() and scripts.is_dir() and not scripts.is_symlink()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def _strings(value: object) -> Iterator[str]:
    """Every string of a parsed configuration that is not a key."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for inner in value.values() for text in _strings(inner))
    elif isinstance(value, list):
        yield from (text for inner in value for text in _strings(inner))


def _is_import(text: str) -> bool:
    return text.startswith(("$import ", "$from "))


def _imports(code: str, within: str, path: Path) -> Iterator[str]:
    """Dotted names below ``scripts`` that Python code of the package ``within`` imports, wherever in it."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except SyntaxError as error:
        raise ValueError(f"{path} holds no valid Python: {error}") from error
    for node in nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = within.split(".")[: len(within.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name == "scripts" or name.startswith("scripts."))


def _imported_modules(bundle: Path, path: Path, within: str) -> Iterator[str]:
    """Files of ``scripts`` that a Python file of the package ``within`` imports."""
    for name in _imports(path.read_text(encoding="utf-8"), within, path):
        module = _module_file(bundle, name)
        if module is None:
            raise ValueError(f"{path} imports {name}, which is not there")
        yield module


def _module_file(bundle: Path, name: str) -> str | None:
    """File of the innermost module in a dotted name, such as scripts/losses.py for scripts.losses.gaussian_kl."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        stem = "/".join(parts[:end])
        for module in (f"{stem}.py", f"{stem}/__init__.py"):
            if (bundle / module).is_file():
                # an attribute of a bare package is a module that is missing, unless the package itself has it
                bare = (
                    module.endswith("__init__.py")
                    and end < len(parts)
                    and not (bundle / module).read_text(encoding="utf-8").strip()
                )
                return None if bare else module
    return None


def _write_zip(path: Path, members: dict[str, Path]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for member, source in sorted(members.items()):
            entry = zipfile.ZipInfo(member, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, on every system
            entry.external_attr = 0o100644 << 16
            # stored: half-precision weights hardly shrink, and what deflate writes depends on the build of zlib
            entry.compress_type = zipfile.ZIP_STORED
            archive.writestr(entry, source.read_bytes())


def _write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")
