"""What a result says of where it came from."""

import subprocess

from experiments.store import results


def test_a_changed_file_marks_the_commit_and_a_result_does_not(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return said.stdout.strip()

    monkeypatch.delenv("EXPERIMENTS_COMMIT", raising=False)

    def commit():
        return results.provenance(1)["commit"]

    code = tmp_path / "experiments" / "store" / "results.py"
    saved = tmp_path / "experiments" / "results" / "bench" / "one.json"
    for file in (code, saved):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    monkeypatch.setattr(results, "__file__", str(code))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    first = git("rev-parse", "HEAD")
    assert commit() == first
    saved.write_text("2")
    assert commit() == first
    code.write_text("2")
    assert commit() == f"{first}-changed"


def test_a_copy_takes_the_commit_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERIMENTS_COMMIT", "0123abc")
    assert results.provenance(1)["commit"] == "0123abc"
    monkeypatch.delenv("EXPERIMENTS_COMMIT")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.provenance(1)["commit"] is None
