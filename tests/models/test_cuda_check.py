"""The check on CUDA, of which a dry run does all without a GPU."""

from pathlib import Path

from click.testing import CliRunner

from models.benchmarks.cuda_check import cases, main


def test_a_dry_run_writes_a_row_for_every_model_and_precision(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    options = ["--dry-run", "--seconds", "0.001", "--markdown", str(table)]
    done = CliRunner().invoke(main, options, catch_exceptions=False)
    assert done.exit_code == 0
    lines = table.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    names = [name for name, _, _ in cases(dry_run=True)]
    assert [row[:2] for row in rows] == [[n, p] for n in names for p in ("fp32", "fp16")]
    assert {len(row) for row in rows} == {9}
    assert all(float(row[4]) > 0 and float(row[5]) > 0 for row in rows)
