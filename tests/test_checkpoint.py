"""A checkpoint is read back whole or refused."""

import pytest
import torch

from flywheel_fast import checkpoint
from flywheel_fast.errors import BadInput, Failure

STATE = {"weights": torch.arange(100.0), "history": [{"cycle": 1, "gamma": 0.5}], "steps": 3}


def test_reads_back_what_was_written(tmp_path):
    path = tmp_path / "weights" / "last.pt"
    checkpoint.save(path, STATE)
    read = checkpoint.load(path)
    assert torch.equal(read["weights"], STATE["weights"]) and read["history"] == STATE["history"]
    assert torch.equal(torch.load(path, weights_only=True)["weights"], STATE["weights"])  # a plain torch file too
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_any_cut_or_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    content = path.read_bytes()
    for at in range(0, len(content), 37):
        path.write_bytes(content[:at])
        with pytest.raises(BadInput, match=r"last\.pt.*cut short or altered"):
            checkpoint.load(path)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(BadInput, match=r"last\.pt.*cut short or altered"):
            checkpoint.load(path)


def test_the_one_before_is_kept_and_used_where_the_last_is_spoilt(tmp_path):
    path, said = tmp_path / "last.pt", []
    for steps in (1, 2, 3):
        checkpoint.save(path, STATE | {"steps": steps})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert checkpoint.load_last(path, said.append)["steps"] == 3 and not said
    content = path.read_bytes()
    for spoilt in (content[:-9], b"", content[:500] + bytes([content[500] ^ 16]) + content[501:], None):
        path.unlink() if spoilt is None else path.write_bytes(spoilt)  # None: killed between two renames
        assert checkpoint.load_last(path, said.append)["steps"] == 2
        assert "last.pt" in said[-1] and "previous.pt" in said[-1]
    assert len(said) == 4
    (tmp_path / "previous.pt").write_bytes(content[:100])
    with pytest.raises(BadInput, match=r"previous\.pt.*cut short or altered"):
        checkpoint.load_last(path, said.append)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    checkpoint.save(tmp_path / "last.pt", {"weights": Evil()})
    with pytest.raises(BadInput, match=r"last\.pt: holds something else than tensors"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(Failure, match=r"last\.pt.*No space left"):
        checkpoint.save(path, STATE)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
