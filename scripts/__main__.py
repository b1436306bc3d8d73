"""Command line ``python -m scripts``: what ``monai.bundle`` does not do already."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from pydoc import locate

import fire
from monai.bundle import ConfigParser

from scripts import speed
from scripts.bundle import build_network, configuration
from scripts.fingerprint import Fingerprint
from scripts.messages import tell_errors_in_one_line
from scripts.release.demo import draw_cine, draw_scan
from scripts.release.download import DownloadError
from scripts.release.download import download as fetch
from scripts.release.package import package_all
from scripts.release.phantoms import draw_abdomen, draw_abdomens, paint_boxes
from scripts.release.report import report as write_report
from scripts.release.verify import run_inference
from scripts.release.verify import verify as faults_of
from scripts.tasks.anomaly.benchmark import compare_with_published, grey_level_baseline, tune
from scripts.tasks.anomaly.comparison import Method, compare_methods, methods_of
from scripts.tasks.anomaly.evaluation import choose_floor
from scripts.tasks.anomaly.painted import outside_check, painted_table

BUNDLES = Path(__file__).resolve().parent.parent / "bundles"


def _bundles(*names: str) -> list[Path]:
    """Folders of the named bundles, each a name of the project's or the path of another folder; of all if none is named."""
    known = {path.parents[1].name: path.parents[1] for path in sorted(BUNDLES.glob("*/configs/metadata.json"))}
    for name in map(str, names):
        if name not in known and (Path(name) / "configs" / "metadata.json").is_file():
            known[name] = Path(name).resolve()
        if name not in known:
            sys.exit(f"no bundle '{name}'; there are: {', '.join(known)}")
    return [known[str(name)] for name in names or known]


def _bundle(name: str) -> Path:
    return _bundles(name)[0]


def list_bundles() -> None:
    """Print every bundle with its version and what it does."""
    for bundle in _bundles():
        meta = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
        print(f"{bundle.name}  {meta['version']}  {meta['task']}")


def demo(output_dir: str = "demo_output", **settings: object) -> None:
    """Run brain_mri_anomaly_ddim on a generated scan that shows no patient, and print where the results are.

    Args:
        output_dir: folder to write to.
        settings: other settings of its inference.
    """
    bundle = _bundle("brain_mri_anomaly_ddim")
    output = Path(output_dir).resolve()
    try:
        run_inference(bundle, bundle / "docs" / "demo.nii.gz", output, overwrite=True, **settings)
    except RuntimeError as error:
        sys.exit(str(error))
    for ending, what in (
        ("seg.nii.gz", "mask"),
        ("map.nii.gz", "anomaly map"),
        ("healthy.nii.gz", "pseudo-healthy scan"),
        ("overview.png", "picture"),
    ):
        print(f"{what + ':':<20} {output / 'demo' / f'demo_{ending}'}")
    print(f"{'table:':<20} {output / 'results.csv'}")


def verify(*names: str, schema: str | None = None) -> None:
    """Check bundles (all of them if none is named); print one line a fault, and exit with 1 if there is one.

    Args:
        names: bundles.
        schema: file with MONAI's schema of the metadata, which nothing is downloaded in place of; without it only the
            required keys are checked, and a line says so.
    """
    if not schema:
        print("not checked, as no --schema is given: the metadata beyond the required keys")
    faulty = False
    for bundle in _bundles(*names):
        faults = faults_of(bundle, schema)
        faulty |= bool(faults)
        print("\n".join([f"{bundle.name}: {fault}" for fault in faults] or [f"{bundle.name}: verified"]))
    if faulty:
        sys.exit(1)


def run_benchmark(name: str, dataset_dir: str, num_slices: int = 8, section: str = "validation") -> None:
    """Time the published procedure against the bundle's default on the same data with the same weights.

    Args:
        name: bundle.
        dataset_dir: folder of labelled cases, or of healthy ones if the bundle is measured on painted lesions; of real
            images if it generates images.
        num_slices: slices to measure on, half of them with a lesion, or images to generate.
        section: section of the cases.
    """
    speed.benchmark(_bundle(name), dataset_dir, num_slices, section)


def run_tune(
    name: str,
    dataset_dir: str,
    noise_levels: tuple[int, ...] = (200, 300, 400),
    gradient_scales: tuple[float, ...] = (30, 100, 300),
    num_slices: int = 48,
    section: str = "validation",
    figure: str | None = None,
    **settings: object,
) -> None:
    """Print a table of Dice and AUROC over the gradient scale for several noise levels, as in the paper's figure.

    Args:
        name: bundle that is guided by a classifier.
        dataset_dir: folder of labelled cases.
        noise_levels: levels L.
        gradient_scales: scales s.
        num_slices: slices to measure on, half of them with a lesion.
        section: section of the cases.
        figure: PNG to draw, or None.
        settings: other arguments of the network.
    """
    tune(_bundle(name), dataset_dir, noise_levels, gradient_scales, num_slices, section, figure, settings)


def run_published(name: str, dataset_dir: str, output_dir: str, num_slices: int = 60, section: str = "test") -> None:
    """Print how well the published procedure and the default find lesions, on slices spread over all patients.

    The same command goes on after a stop.

    Args:
        name: bundle that is guided by a classifier.
        dataset_dir: folder of labelled cases.
        output_dir: folder in which the networks' outputs are kept, slice by slice.
        num_slices: slices to measure on.
        section: section of the cases.
    """
    compare_with_published(_bundle(name), dataset_dir, Path(output_dir), num_slices, section)


def run_floor(
    name: str,
    results: str,
    dataset_dir: str,
    most_ml: float = 1.0,
    cap_ml: float = 10.0,
    section: str = "validation",
) -> None:
    """Print the floor of the mask's threshold that bounds the volume found in slices without a lesion.

    Args:
        name: bundle.
        results: folder of the maps of an evaluation of that section.
        dataset_dir: folder of the labelled cases.
        most_ml: largest expected volume a patient, in ml, where volumes above ``cap_ml`` count as that.
        cap_ml: see there.
        section: section of the cases.
    """
    choose_floor(_bundle(name), Path(results), dataset_dir, most_ml, cap_ml, section)


def run_baseline(name: str, dataset_dir: str, channel: int = 1) -> None:
    """Print the mean Dice over the test volumes of thresholds on one sequence (1 is FLAIR), plain and dressed as the map is.

    Args:
        name: bundle.
        dataset_dir: folder of labelled cases.
        channel: number of the sequence.
    """
    grey_level_baseline(_bundle(name), dataset_dir, channel)


def compare(
    *names: str, dataset_dir: str, output_dir: str, section: str = "test", also: str | None = None, **settings: object
) -> None:
    """Compare methods on the same patients by one rule; print a table, and write it with its intervals.

    Of a bundle whose evaluate.json lists ``methods``, these. Else all bundles that find anomalies in brain MRI, or those
    that are named, and the controls beside them.

    Args:
        names: one bundle with methods of its own; or bundles that find anomalies, all of them if none is named.
        dataset_dir: folder of labelled cases.
        output_dir: folder for the results of each method, and for the comparison's table and picture.
        section: section to measure on.
        also: JSON file with further methods by their names, each with ``configs`` and settings as in evaluate.json; for
            anomalies with ``bundle``, and ``configs`` and ``settings`` if it has other than the bundle itself. So weights of
            a training of your own are compared.
        settings: other settings of all evaluations; for anomalies ``most_false_ml``, the millilitres that are expected to be
            found falsely in a volume (5), and ``cap_ml``, as which more counts (20), by which thresholds are chosen.
    """
    more = json.loads(Path(also).read_text(encoding="utf-8")) if also else {}
    bundles = _bundles(*names)
    named = [bundle for bundle in bundles if names and (bundle / "configs" / "evaluate.json").is_file()]
    evaluations = {bundle: configuration(bundle, "inference", "evaluate") for bundle in named}
    within = [bundle for bundle, evaluation in evaluations.items() if evaluation.get("methods")]
    if within and len(bundles) > 1:
        sys.exit(f"{within[0].name} has methods of its own: name it alone")
    if within:
        _compare_evaluations(within[0], evaluations[within[0]], more, dataset_dir, Path(output_dir), section, settings)
        return
    if unknown := [name for name in settings if name not in ("most_false_ml", "cap_ml")]:
        sys.exit(f"--{unknown[0]}: no such setting of a comparison of anomalies, which has --most_false_ml and --cap_ml")
    methods = methods_of(bundles)
    for name, about in more.items():
        methods[name] = Method(_bundle(about["bundle"]), tuple(about.get("configs", ())), about.get("settings", {}))
    if not methods:
        sys.exit("none of the bundles finds anomalies in brain MRI, or has methods in its evaluate.json")
    compare_methods(methods, str(dataset_dir), str(output_dir), section=section, **settings)


def _compare_evaluations(
    bundle: Path,
    evaluation: ConfigParser,
    more: dict[str, dict],
    dataset_dir: str,
    output_dir: Path,
    section: str,
    settings: dict[str, object],
) -> None:
    """Evaluate every method of a bundle into a folder of its own, and compare them as its evaluate.json says."""
    folders = {}
    for method, own in {**evaluation["methods"], **more}.items():
        folders[method] = output_dir.resolve() / re.sub(r"[^\w-]+", "_", method)
        changes = {"section": section, **settings, **{key: value for key, value in own.items() if key != "configs"}}
        configs = ("evaluate", *own.get("configs", ()))
        try:
            run_inference(bundle, Path(dataset_dir).resolve(), folders[method], configs, **changes)
        except RuntimeError as error:
            sys.exit(f"{method}: {error}")
    locate(evaluation["comparison"])(folders, output_dir)


def fingerprint(name: str, dataset_dir: str, foreground: float = 0.1, **settings: object) -> None:
    """Measure the slices that a bundle is trained on, and write what is usual of them to its models/fingerprint.json.

    Args:
        name: bundle whose training is by slices.
        dataset_dir: folder of the cases, as for the training.
        foreground: grey level, as the network sees it, above which a pixel is foreground.
        settings: other settings of the training.
    """
    bundle = _bundle(name)
    parser = configuration(bundle, "train")
    parser.update({"dataset_dir": str(dataset_dir), **settings})
    cases = [parser.get_parsed_content(f"{part}#dataset").slices_by_case() for part in ("train", "validate")]
    measured = Fingerprint.of(cases[0], foreground)
    unlike = [max(ratios.values()) > 1 for ratios in map(measured.compare, cases[1]) if ratios]
    path = bundle / "models" / "fingerprint.json"
    measured.save(path)
    print(f"{path}: {measured.num_cases} training cases; {sum(unlike)} of {len(unlike)} validation cases are unlike them")


def draw(name: str, path: str, seed: int = 0, num_slices: int = 8) -> None:
    """Draw a scan that shows no patient, with the bundle's diffusion model; for cines and abdomens, a phantom.

    Args:
        name: bundle.
        path: file to write, .nii.gz, which must not be there yet.
        seed: seed of the noise.
        num_slices: number of slices.
    """
    if Path(path).exists():
        sys.exit(f"{path}: is there already, and is not replaced; name another file")
    meta = json.loads((_bundle(name) / "configs" / "metadata.json").read_text(encoding="utf-8"))
    if "source" in meta["network_data_format"]["inputs"]["image"]["channel_def"].values():
        draw_cine(Path(path), num_slices, seed)
    elif "organ" in configuration(_bundle(name), "inference"):
        draw_abdomen(Path(path), num_slices, seed)
    else:
        draw_scan(_bundle(name), Path(path), num_slices, seed)


def phantoms(folder: str, number: int = 12, contrast: float = 60.0, seed: int = 0) -> None:
    """Write made CTs, two of three with a tumour in the pancreas, in the layout of the Medical Segmentation Decathlon.

    Args:
        folder: folder to write, which must not be there yet.
        number: number of patients.
        contrast: by how many HU a tumour is darker than the organ, on average.
        seed: seed of the patients.
    """
    try:
        draw_abdomens(Path(folder), number, contrast, seed)
    except FileExistsError:
        sys.exit(f"{folder}: is there already, and is not replaced; name another folder")


def paint(boxes: str, folder: str, copies: int = 3, seed: int = 0) -> None:
    """Paint tumours into pictures of healthy organs, to train and measure on: folders healthy, diseased and masks.

    Args:
        boxes: folder of pictures <patient>_<anything>.png, cut round healthy organs at one magnification.
        folder: folder to write, which must not be there yet.
        copies: how many tumours are painted into each, one a copy.
        seed: seed of the tumours.
    """
    try:
        print(f"{paint_boxes(Path(boxes), Path(folder), copies, seed=seed)} pictures with a tumour in {folder}")
    except FileExistsError:
        sys.exit(f"{folder}: is there already, and is not replaced; name another folder")


def painted(name: str, dataset_dir: str, output_dir: str = "painted", section: str = "test", **settings: object) -> None:
    """Measure a bundle on painted tumours, over their contrast and size, beside a plain threshold; writes painted.csv.

    Args:
        name: bundle that takes slices of one channel.
        dataset_dir: folder that `paint` has written.
        output_dir: folder to write to.
        section: section of the patients; the thresholds are chosen on the validation section.
        settings: other arguments of the network.
    """
    painted_table(build_network(_bundle(name), **settings), dataset_dir, output_dir, section)


def outside(name: str, healthy_dir: str, tumour_dir: str, section: str = "test", **settings: object) -> None:
    """Print what a bundle's probability tells of boxes round real tumours, and what size, darkness and noise alone tell.

    Args:
        name: bundle that takes slices of one channel.
        healthy_dir: boxes round healthy organs, <patient>_<anything>.png.
        tumour_dir: boxes round tumours, likewise.
        section: section of the healthy patients; all tumours are taken.
        settings: other arguments of the network.
    """
    for figure, auroc in outside_check(build_network(_bundle(name), **settings), healthy_dir, tumour_dir, section).items():
        print(f"AUROC of {figure}: {auroc:.3f}")


def package(*names: str, output: str = "dist", url_base: str = "") -> None:
    """Make bundles ready to ship: a self-contained folder and a zip each, their hashes, and MONAI's model_info.json.

    Args:
        names: bundles; all of them if none is named.
        output: folder to write to.
        url_base: address that the zips will be served from.
    """
    try:
        for done in package_all(_bundles(*names), Path(output), url_base):
            print(f"{done['sha256']}  {done['zip']}")
    except (ValueError, OSError) as error:
        sys.exit(str(error))


def download(name: str, url: str, output: str = ".", sha256: str | None = None, overwrite: bool = False) -> None:
    """Fetch a published bundle, check its SHA-256, and only then unpack it.

    Args:
        name: bundle.
        url: address of its zip, or of the folder with SHA256SUMS.
        output: folder that the bundle's folder is made in.
        sha256: the hash, if it is not to be taken from the published list.
        overwrite: replace a folder of that name.
    """
    try:
        print(fetch(name, url, Path(output), None if sha256 is None else str(sha256), overwrite))
    except DownloadError as error:
        sys.exit(str(error))


def report(results: str, path: str | None = None) -> None:
    """Write one HTML page over a cohort's results, which opens without a network.

    Args:
        results: folder that inference has written.
        path: the page; by default report.html in that folder.
    """
    print(write_report(Path(results), None if path is None else Path(path)))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
    else:
        tell_errors_in_one_line()
    fire.Fire(
        {
            "list": list_bundles,
            "demo": demo,
            "verify": verify,
            "benchmark": run_benchmark,
            "tune": run_tune,
            "baseline": run_baseline,
            "published": run_published,
            "floor": run_floor,
            "compare": compare,
            "fingerprint": fingerprint,
            "draw": draw,
            "phantoms": phantoms,
            "paint": paint,
            "painted": painted,
            "outside": outside,
            "package": package,
            "download": download,
            "report": report,
        },
        name="scripts",
    )


if __name__ == "__main__":
    main()
