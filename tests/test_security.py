"""What SECURITY.md promises and no other test shows."""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import write_run

from fastssl import report

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastssl", "kernels", "data_prep", "configs", "bench", "tools")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
# Calls that run code which data name, or write where data say.
FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load",
    "marshal.loads", "shelve.open", "joblib.load", "yaml.load", "yaml.unsafe_load", "shutil.unpack_archive",
    "pandas.read_pickle", "torch.load", "np.load", "dill.load", "cloudpickle.load",
}  # fmt: skip
METHODS = {"extractall"}  # of archives
ALLOWED = {
    ("fastssl/config/python_file.py", "exec"): "a config file is a program of the user's",
    ("fastssl/config/source.py", "exec"): "the source of fastssl's own methods",
    ("fastssl/files/untrusted.py", "torch.load"): "weights_only=True, and its result is checked",
    ("fastssl/eval/common/cache.py", "np.load"): "without allow_pickle",
}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_no_call_runs_code_from_data():
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, options = called(node), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert options.get("shell", "False") == "False", f"{path}:{node.lineno} starts a shell"
            assert options.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
            assert name != "torch.load" or options.get("weights_only") == "True", f"{path}:{node.lineno}"
            if name.startswith("subprocess."):
                given = node.args[:1] or [k.value for k in node.keywords if k.arg == "args"]
                assert not any(isinstance(arg, ast.JoinedStr | ast.Constant) for arg in given), f"{path}:{node.lineno}"
            if name in FORBIDDEN or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
                found.add((str(path.relative_to(ROOT)), name))
    assert found == set(ALLOWED)


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/reliability.md"])
def test_the_tests_that_security_md_names_exist(page):
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / page).read_text())
    assert len(named) >= 15
    for file, name in named:
        functions = [n.name for n in ast.parse((ROOT / file).read_text()).body if isinstance(n, ast.FunctionDef)]
        assert name in functions, f"{file} has no {name}"


def test_every_promise_names_a_test():
    lines = (ROOT / "SECURITY.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| promise", "|--"))]
    assert len(rows) >= 8 and all("`tests/" in row for row in rows)


HOSTILE = """x"'><img src=x onerror=alert(1)></title></script><script>alert(1)</script>"""
HOSTILE += """<a href="javascript:alert(1)">&lt;"""


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.links = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name in ("href", "src", "action", "xlink:href")]


def hostile(value, name=None):
    """The JSON value with every text replaced but the keys that the report looks for."""
    if isinstance(value, dict):
        return {**{key: hostile(part, key) for key, part in value.items()}, HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [hostile(part) for part in value]
    return HOSTILE if isinstance(value, str) and name != "protocol" else value


def page_of(folder, out):
    with contextlib.redirect_stdout(io.StringIO()):
        assert report.main([str(folder), "--points", "0", "--out", str(out)]) == 0
    return out.read_text()


def test_the_report_escapes_what_a_run_folder_holds(tmp_path):
    """Names, paths, values, keys, log, environment and results of evaluations give no element and no attribute."""
    result = {"protocol": "knn", "of": {"test": "t", "features": "weights"}, "options": {"a": "b"}}
    result["results"] = [{"k": 10, "top1": 50.0, "setting": "s"}]
    environment = [{"step": 0, "ranks": 1, "device": "cpu", "torch": "2", "command": "c", "time": "t", "host": "h"}]
    pages = []
    for name, change in (("plain", lambda value: value), (HOSTILE.replace("/", "|"), hostile)):
        folder = write_run(tmp_path / name, ("a.beton", "b.beton"), 24, weights=False)
        config = change(json.loads((folder / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "environment.json").write_text(json.dumps(change(environment)))
        (folder / "knn.json").write_text(json.dumps(change(result)))
        with open(folder / "log.jsonl", "a") as log:
            log.write(json.dumps(change({"step": 25, "epoch": 2, "loss": 1.0, "x": "nan"}) | {name: 1.0}) + "\n")
            log.write(HOSTILE + "\n")
        pages.append(page_of(folder, tmp_path / "o.html"))
    plain, other = map(Page, pages)
    assert HOSTILE not in pages[1] and "&lt;img src=x onerror" in pages[1]
    assert set(other.tags) <= set(plain.tags) and other.tags.count("script") == plain.tags.count("script") == 1
    assert other.attributes <= plain.attributes and not [name for name in other.attributes if name.startswith("on")]
    assert all(link.startswith(("#", "data:")) for link in other.links)


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_the_launch_on_several_hosts_passes_no_secret_on_a_command_line(tmp_path, launcher):
    """A command line can be read by everyone on the machine.  pdsh and mpirun are replaced by a script that writes its
    arguments."""
    write = f'open("{tmp_path}/arguments", "a").write(json.dumps(sys.argv) + "\\n")'
    for name in ("pdsh", "mpirun", "ompi_info", "ssh"):
        (tmp_path / name).write_text(f"#!{sys.executable}\nimport json, sys\n{write}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT", "PASSWORD")
    secrets = {key: f"secret-{key}" for key in names}
    command = ["-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hosts"), "--launcher", launcher]
    command += ["--master_addr", "node1", "--no_ssh_check", str(ROOT / "fastssl" / "train.py"), "c.py", "optim.lr=0.1"]
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    env = {**os.environ, **secrets, **paths}
    done = subprocess.run([sys.executable, *command], env=env, cwd=tmp_path, capture_output=True, text=True)
    passed = (tmp_path / "arguments").read_text()
    assert "optim.lr=0.1" in passed, done.stderr[-2000:]
    assert "secret-" not in passed + done.stdout + done.stderr
