"""Run folders, checkpoints, weights and sources of images that someone else made, given to the commands."""

import contextlib
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from conftest import jpeg, photo, write_beton
from mutations import both, damaged, fuzz, mixed, odd, odd_json
from report_runs import SPEC, lines, write_run

from fastssl import backbones, data_prep, log, report, weights
from fastssl.checkpoint import state
from fastssl.eval import options, semisup
from fastssl.eval.common import cache, stored_results
from fastssl.eval.common.target import load_target
from fastssl.eval.detection import data as detection
from fastssl.loader import Loader
from fastssl.sampler import Sampler
from fastssl.weights import publish, upgrade


def command(main, argv) -> None:
    """Run a command; ValueError with what it prints where its exit code is 2, in one line."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = main([str(word) for word in argv])
    if code:
        text = said.getvalue().split("\n  python -c")[0].strip()
        assert code == 2 and "\n" not in text and "Traceback" not in text, (argv, text)
        raise ValueError(text)


@pytest.fixture(scope="module")
def betons(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("betons"), np.random.default_rng(0)
    images = [photo(rng, 16, 16) for _ in range(6)]
    return [str(write_beton(folder / f"{name}.beton", images, [i % 2 for i in range(6)])) for name in ("a", "b")]


def outputs_removed(folder, keep):
    for path in sorted(folder.rglob("*"), reverse=True):
        if path not in keep and path.is_file():
            path.unlink()


@both
def test_damaged_config_of_a_run(betons, tmp_path, cases):
    """config.json, as evaluations, publish and the report read it."""
    folder = write_run(tmp_path / "run", betons, 3)
    config, keep = json.loads((folder / "config.json").read_text()), set(tmp_path.rglob("*"))

    def make(rng, _):
        outputs_removed(tmp_path, keep)
        (folder / "config.json").write_bytes(odd_json(config, rng))
        return rng.randrange(3)

    def read(which):
        if which == 0:
            args = options.parser("knn").parse_args([str(folder), "--device", "cpu", "--workers", "1"])
            args.device = torch.device("cpu")
            load_target(args, ("train", "test"))
        elif which == 1:
            command(publish.main, [folder])
        else:
            command(report.main, [folder, "--points", "0", "--out", tmp_path / "o.html"])

    fuzz(make, read, cases, tmp_path)


@both
def test_damaged_results_and_environment_of_a_run(betons, tmp_path, cases):
    folder = write_run(tmp_path / "run", betons, 3, weights=False)
    result = {"protocol": "knn", "of": {"test": "t"}, "results": [{"k": 10, "top1": 50.0}], "options": {}}
    good = {"environment.json": [{"step": 0, "ranks": 1, "device": "cpu"}], "result.json": result}
    whole = (folder / "config.json").read_bytes()

    def make(rng, _):
        name = rng.choice(["environment.json", "result.json", "log.jsonl"])
        (folder / "config.json").write_bytes(whole if rng.random() < 0.9 else damaged(whole, rng))
        text = mixed([line.encode() for line in lines(6)], rng) if name == "log.jsonl" else odd_json(good[name], rng)
        (folder / name).write_bytes(text)
        if rng.random() < 0.1:
            return tmp_path / rng.choice(["nowhere", "\0", "run/log.jsonl", "x" * 300])
        return folder

    fuzz(
        make,
        lambda path: command(report.main, [path, "--points", "0", "--out", tmp_path / "o.html"]),
        cases,
        tmp_path,
        refused_at_least=1,
    )


@both
def test_a_damaged_log_is_continued(tmp_path, cases):
    """A resumed run keeps the records up to its checkpoint, whatever the lines between them are."""
    good = [json.dumps({"step": i, "epoch": 0, "loss": 1.0 / i}).encode() for i in range(1, 7)]

    def make(rng, _):
        text = list(good)
        for _ in range(rng.randint(1, 3)):
            text[rng.randrange(6)] = rng.choice(
                [b"", b"\xff", odd_json({"step": 1}, rng), b'{"step": 2, "lo{"step": 3}']
            )
        (tmp_path / "log.jsonl").write_bytes(b"\n".join(text) + rng.choice([b"\n", b"", b"\n{"]))
        return [line for line in text if line in good]

    def read(kept):
        with contextlib.redirect_stdout(io.StringIO()):
            made = log.Log(tmp_path, every=5, total_steps=9, tensorboard=False)
            made.truncate(4)
        found = (tmp_path / "log.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in found]
        wanted = {json.loads(line)["step"] for line in kept[:-1]} & {1, 2, 3, 4}
        assert wanted <= set(steps)

    fuzz(make, read, cases, tmp_path, refused_at_least=0)


@both
def test_damaged_state_of_a_checkpoint(tmp_path, cases):
    good = {"step": 2, "scale": {"value": 1.0}, "config": {"speed": {"zero": 0}, "seed": 0}, "world": 1, "hooks": {}}
    torch.save(good, tmp_path / "state.pt")
    whole = (tmp_path / "state.pt").read_bytes()

    def make(rng, _):
        if rng.random() < 0.5:
            torch.save(odd(good, rng), tmp_path / "state.pt")
        else:
            (tmp_path / "state.pt").write_bytes(damaged(whole, rng))

    fuzz(make, lambda _: state.read(tmp_path), cases, tmp_path)


def other_tensor(value, rng):
    how = rng.randrange(9)
    if how == 0:
        return value[None]
    if how == 1:
        return value.flatten()[: rng.randint(0, 3)]
    if how == 2:
        return value.to(
            rng.choice([torch.int64, torch.bool, torch.complex64, torch.float64, torch.bfloat16, torch.uint8])
        )
    if how == 3:
        return torch.full_like(value, float("nan")) if value.is_floating_point() else value
    if how == 4:
        return value.mT if value.ndim > 1 else value
    return rng.choice([torch.tensor(1.0), torch.empty(0), value.expand(2, *value.shape), value])


@both
def test_damaged_foreign_weights(tmp_path, cases):
    """Names, shapes and types of tensors as no project has them."""
    path = tmp_path / "w.pth"
    net = backbones.build(SPEC)
    good, other = net.state_dict(), backbones.build(SPEC)

    def make(rng, _):
        found = dict(good)
        for _ in range(rng.randint(1, 4)):
            key = rng.choice(list(found))
            value = found.pop(key)
            if rng.random() < 0.7:
                new = key if rng.random() < 0.6 else rng.choice(["", ".", key + ".x", "fc.weight", "\0", key.upper()])
                found[new] = other_tensor(value, rng)
        prefix = rng.choice(["", "module.", "teacher.backbone.", "0.", "state_dict."])
        held = {prefix + key: value for key, value in found.items()}
        holder = rng.choice(["state_dict", "model", "x", 5, None])
        torch.save(held if holder is None else {holder: held, "meta": rng.choice([None, "x", {"config": 3}])}, path)
        return rng.randrange(3)

    def read(which):
        if which == 2:
            command(upgrade.main, [path, tmp_path / "out.safetensors"])
            (tmp_path / "out.safetensors").unlink()
        else:
            weights.load_backbone(path, other, which=[None, "teacher"][which])

    fuzz(make, read, cases, tmp_path)


@both
def test_damaged_lists_of_images(tmp_path, cases):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(jpeg(photo(np.random.default_rng(i), 12, 16)))
    keep = set(tmp_path.rglob("*")) | {tmp_path / "in" / "l.txt", tmp_path / "names.txt"}
    texts = [
        b"0.jpg 0",
        b"1.jpg 1",
        b"2.jpg,cat",
        b"0.jpg dog",
        b"../in/0.jpg",
        b"/etc/passwd 1",
        b"missing.jpg",
        b"0.jpg 1 2 3",
    ]
    texts += [b"l.txt 0", b"$(touch bombed).jpg", b"0.jpg\0 1", b"0.jpg -1", b'"0.jpg",1', b"path,label", b"\xff 1"]

    def make(rng, _):
        outputs_removed(tmp_path, keep)
        (tmp_path / "in" / "l.txt").write_bytes(mixed(texts, rng))
        more = []
        if rng.random() < 0.3:
            (tmp_path / "names.txt").write_bytes(mixed([b"cat", b"dog", b"0", b""], rng))
            more = ["--classes", tmp_path / "names.txt"]
        return more + (["--label-columns", rng.choice(["1", "2-", "9", "x"])] if rng.random() < 0.3 else [])

    def read(more):
        command(data_prep.main, ["list", tmp_path / "in" / "l.txt", tmp_path / "o.beton", "--workers", "1", *more])

    fuzz(make, read, cases, tmp_path)


@both
def test_damaged_archives_are_read_to_the_end(tmp_path, cases):
    """`fastssl convert zip`: a .beton with its card, or one line and nothing."""
    image, keep = jpeg(photo(np.random.default_rng(0), 12, 16)), {tmp_path / "a.zip"}
    names = [
        "a/1.jpg",
        "b/2.jpg",
        "../x.jpg",
        "/x.jpg",
        "a/../../x.jpg",
        "c:\\x.jpg",
        "a/\0.jpg",
        ".hidden/1.jpg",
        "a/",
        "",
    ]

    def make(rng, _):
        outputs_removed(tmp_path, keep)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as z:
            for _ in range(rng.randint(0, 3)):
                z.writestr(rng.choice(names) or "x", image if rng.random() < 0.8 else damaged(image, rng))
        data = out.getvalue()
        (tmp_path / "a.zip").write_bytes(damaged(data, rng) if rng.random() < 0.5 else data)

    def read(_):
        command(data_prep.main, ["zip", tmp_path / "a.zip", tmp_path / "o.beton", "--workers", "1"])
        assert (tmp_path / "o.beton").exists() and (tmp_path / "o.json").exists()

    fuzz(make, read, cases, tmp_path)


@both
def test_damaged_labelled_subsets(betons, tmp_path, cases):
    loader = Loader(betons[0], 2, Sampler.sequential(), device="cpu", workers=1)
    texts = [b"0", b"3", b"5", b"6", b"-1", b"a/0.jpg", b"0.jpg", b"0.jpg 0", b"1.jpg 1", b"9" * 40, b"\xff", b" "]

    def make(rng, _):
        for name in ("subset", "names"):
            (tmp_path / name).write_bytes(mixed(texts, rng))
        return rng.choice([None, str(tmp_path / "names"), str(tmp_path)])

    fuzz(make, lambda names: semisup.read_subset(str(tmp_path / "subset"), loader, names), cases, tmp_path)


VOC_XML = """<annotation><size><width>16</width><height>16</height></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"""
BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij")
)
BOMB += "]><annotation>&j;</annotation>"


@both
def test_damaged_boxes_of_voc(tmp_path, cases):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "JPEGImages" / "1.jpg").write_bytes(jpeg(photo(np.random.default_rng(0), 16, 16)))

    def make(rng, case):
        text = (
            VOC_XML
            if rng.random() < 0.9
            else VOC_XML.replace("<name>", '<!ENTITY x SYSTEM "file:///etc/passwd"><name>&x;')
        )
        for number in ("16", "9", "0", "cat"):
            if rng.random() < 0.2:
                text = text.replace(
                    f">{number}<", f">{rng.choice(['', 'nan', '-1', '1e999', '9' * 400, '&x;', 'dog'])}<", 1
                )
        data = BOMB.encode() if rng.random() < 0.02 else text.encode()
        (tmp_path / "Annotations" / "1.xml").write_bytes(damaged(data, rng) if rng.random() < 0.4 else data)
        (tmp_path / "ImageSets" / "Main" / "s.txt").write_bytes(mixed([b"1", b"1 -1", b"../1", b"\xff"], rng) or b"1")

    fuzz(make, lambda _: [p.read() for p in detection.read_voc(str(tmp_path), ("s",), ("cat",))], cases, tmp_path)


@both
def test_damaged_boxes_of_coco(tmp_path, cases):
    for name in ("annotations", "s"):
        (tmp_path / name).mkdir()
    (tmp_path / "s" / "1.jpg").write_bytes(jpeg(photo(np.random.default_rng(0), 16, 16)))
    good = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 16, "height": 16}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 5, 6], "area": 30, "iscrowd": 0}],
        "categories": [{"id": 3, "name": "cat"}],
    }

    def make(rng, _):
        (tmp_path / "annotations" / "instances_s.json").write_bytes(odd_json(good, rng))

    fuzz(make, lambda _: [p.read() for p in detection.read_coco(str(tmp_path), "s")[0]], cases, tmp_path)


@both
def test_damaged_stored_features_and_results(tmp_path, cases):
    """Both are computed again where they cannot be read: nothing is refused."""
    store = object.__new__(cache.FeatureStore)
    store.folder, store.layers, store.samples, store.dims = tmp_path / "key", ("last",), 5, [3]
    rows = np.arange(15, dtype=np.float32).reshape(5, 3)
    store.write(0, [rows])
    array, sums = ((store.shard(0) / name).read_bytes() for name in ("last.npy", "crc32.json"))
    part = tmp_path / "r.part.jsonl"

    def make(rng, _):
        (store.shard(0) / "last.npy").write_bytes(
            damaged(array, rng, rng.choice([None, 128])) if rng.random() < 0.7 else array
        )
        (store.shard(0) / "crc32.json").write_bytes(odd_json(json.loads(sums), rng) if rng.random() < 0.5 else sums)
        key = stored_results.files.sha256_json({})
        known = [
            json.dumps({"key": key}).encode(),
            b'{"name": "a", "result": 1}',
            odd_json({"name": "a", "result": 1}, rng),
        ]
        part.write_bytes(known[0] + b"\n" + mixed(known, rng))

    def read(_):
        with contextlib.redirect_stdout(io.StringIO()):
            found = store.read(0)
            assert found is None or np.array_equal(found[0], rows)
            assert isinstance(stored_results.StoredResults(str(tmp_path / "r.json"), {}).done, dict)

    fuzz(make, read, cases, tmp_path, refused_at_least=0)
