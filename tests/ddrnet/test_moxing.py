"""The ModelArts adapter, with a module `moxing` that copies folders: obs://bucket is the folder $BUCKETS/bucket."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run_process, run_script
from src.data.data_utils import moxing_adapter

from utils.cli import UserError

MOXING = """
import os, shutil, sys, time
from pathlib import Path

class ObsError(Exception):
    pass

class file:
    @staticmethod
    def copy_parallel(source, target):
        def place(name):
            return Path(name.replace("s3:", "obs:").replace("obs:/", os.environ["BUCKETS"]))
        with open(os.environ["BUCKETS"] + "/copies", "a") as copies:
            copies.write(f"{source} {target}\\n")
        if not place(source).is_dir():
            raise ObsError(f"(404) NoSuchKey\\n{source}")
        time.sleep(float(os.environ.get("SLOW", "0")))
        shutil.copytree(place(source), place(target), dirs_exist_ok=True)
"""


@pytest.fixture
def buckets(tmp_path, monkeypatch):
    """Folder of the buckets, with a data set in one of them and moxing installed."""
    folder = tmp_path / "buckets"
    for split in ("train", "val"):
        (folder / "mine" / "image net" / split / "cat").mkdir(parents=True)
        (folder / "mine" / "image net" / split / "cat" / "1.png").write_text(split)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "moxing.py").write_text(MOXING)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{ROOT / 'DDRNet'}:{ROOT}")
    monkeypatch.setenv("BUCKETS", str(folder))
    yield folder
    sys.modules.pop("moxing", None)


def copies(buckets) -> list[str]:
    file = buckets / "copies"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("scheme", ["obs", "s3"])
def test_fetch_once(buckets, tmp_path, scheme):
    url = f"{scheme}://mine/image net"
    path = moxing_adapter.fetch_data(url, tmp_path / "cache")
    assert path.parent == tmp_path / "cache" and path.name.startswith("image net-")
    assert (path / "val" / "cat" / "1.png").read_text() == "val"
    assert moxing_adapter.fetch_data(url, tmp_path / "cache") == path and len(copies(buckets)) == 1
    (buckets / "other" / "image net").mkdir(parents=True)
    (buckets / "other" / "image net" / "file").touch()
    other = moxing_adapter.fetch_data(f"{scheme}://other/image net/", tmp_path / "cache")
    assert other != path and [file.name for file in other.iterdir()] == ["file"]


def test_local_data_stay_where_they_are(buckets):
    assert str(moxing_adapter.fetch_data("data/imagenet")) == "data/imagenet" and not copies(buckets)


FETCH = """
import sys
from src.data.data_utils.moxing_adapter import fetch_data
path = fetch_data("obs://mine/image net", sys.argv[1])
print((path / "train" / "cat" / "1.png").read_text(), len(list(path.rglob("*.png"))))
"""


def start(tmp_path, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, str(tmp_path / "cache")],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_one_process_copies_and_the_others_wait(buckets, tmp_path):
    workers = [start(tmp_path, SLOW="1") for _ in range(4)]
    said = [worker.communicate(timeout=60) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, said
    assert all(out.endswith("train 2\n") for out, _ in said)
    assert sum("copying obs://mine/image net to " in out for out, _ in said) == len(copies(buckets)) == 1


def test_copy_that_was_cut_short_is_made_anew(buckets, tmp_path):
    first = start(tmp_path, SLOW="60")
    deadline = time.monotonic() + 60
    while not copies(buckets) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.wait()
    part = next((tmp_path / "cache").glob("*.part"))
    (part / "half").touch()
    path = moxing_adapter.fetch_data("obs://mine/image net", tmp_path / "cache")
    assert sorted(entry.name for entry in path.iterdir()) == ["train", "val"] and not part.exists()


def test_upload(buckets, tmp_path, capsys):
    output = tmp_path / "output"
    (output / "logs").mkdir(parents=True)
    (output / "results.json").write_text("{}")
    (output / "logs" / "worker_0.log").write_text("said")
    moxing_adapter.upload_results(output, "obs://mine/run 1")
    assert (buckets / "mine" / "run 1" / "results.json").read_text() == "{}"
    assert (buckets / "mine" / "run 1" / "logs" / "worker_0.log").read_text() == "said"
    assert capsys.readouterr().out == f"copied {output} to obs://mine/run 1\n"


def test_a_copy_that_fails_in_between_is_told_and_does_not_end_the_training(buckets, tmp_path, capsys):
    (tmp_path / "output").mkdir()
    (buckets / "mine" / "run").touch()
    moxing_adapter.upload_results(tmp_path / "output", "obs://mine/run", last=False)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert not out and line.startswith(f"warning: cannot copy {tmp_path}/output to obs://mine/run: ")
    assert line.endswith("; going on, and trying again later")
    with pytest.raises(UserError, match=f"cannot copy {tmp_path}/output to obs://mine/run"):
        moxing_adapter.upload_results(tmp_path / "output", "obs://mine/run")


def test_a_job_that_is_stopped_loses_nothing(buckets, tmp_path):
    """Copies after the second of three epochs, and when Ctrl-C stops the third; another job goes on from there."""
    digits = tmp_path / "digits"
    words = ["--output", digits, "--images", "4", "--classes", "2", "--size", "32"]
    assert run_script(ROOT / "utils/sample_imagenet.py", *words, cwd=tmp_path).returncode == 0
    words = [ROOT / "tests/ddrnet/small_network.py", "train", "--data_path", digits, "--num_classes", "2"]
    words += ["--config_path", "src/configs/ddrnet23_sample_cpu.yaml", "--image_size", "32", "--batch_size", "4"]
    words += ["--epochs", "3", "--num_workers", "1", "--run_modelarts", "--train_url", "obs://mine/run"]
    words += ["--save_every", "2", "--device_target", "CPU"]
    result = run_process(*words, "--output_dir", tmp_path / "one", cwd=ROOT / "DDRNet", INTERRUPT="step 5")
    assert result.returncode == 130, result.stdout + result.stderr
    said = f"copied {tmp_path}/one to obs://mine/run"
    lines = [line for line in result.stdout.splitlines() if line]
    stopped = f"stopped after step 1 of epoch 3; go on with --resume {tmp_path}/one/resume.ckpt"
    assert [line[:9] for line in lines[-5:]] == ["epoch 1/3", "epoch 2/3", said[:9], stopped[:9], said[:9]]
    assert lines[-3:] == [said, stopped, said] and len(copies(buckets)) == 2
    run = buckets / "mine" / "run"
    for file in (tmp_path / "one").iterdir():
        assert (run / file.name).read_bytes() == file.read_bytes()
    resume = ["--resume", run / "resume.ckpt", "--output_dir", tmp_path / "two"]
    result = run_process(*words, *resume, cwd=ROOT / "DDRNet")
    assert result.returncode == 0 and "going on after step 1 of epoch 3\n" in result.stdout, result
    assert (run / "results.json").read_bytes() == (tmp_path / "two/results.json").read_bytes()


def test_what_can_be_put_right(buckets, tmp_path):
    with pytest.raises(UserError, match=r"cannot copy obs://mine/none to .*NoSuchKey\nobs://mine/none; check the path"):
        moxing_adapter.fetch_data("obs://mine/none", tmp_path / "cache")
    (buckets / "mine" / "empty").mkdir()
    with pytest.raises(UserError, match="obs://mine/empty has nothing in it; set --data_url"):
        moxing_adapter.fetch_data("obs://mine/empty", tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.suffix != ".part"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*; make room"):
        moxing_adapter.fetch_data("obs://mine/image net", tmp_path / "file")


@pytest.mark.parametrize("url", ["obs://mine/data", "data/imagenet"])
def test_without_moxing(tmp_path, url):
    """Data on this machine would do, but the results could not be uploaded after days of training."""
    with pytest.raises(UserError) as error:
        moxing_adapter.fetch_data(url, tmp_path)
    assert str(error.value) == (
        "--run_modelarts works on Huawei Cloud ModelArts only, where the package moxing is installed "
        "(No module named 'moxing'); leave it out elsewhere"
    )
    with pytest.raises(UserError, match="works on Huawei Cloud ModelArts only"):
        moxing_adapter.upload_results(tmp_path, "obs://mine/results")
