"""The README's commands, in its order and with its paths, lightened so that they end in seconds."""

from pipeline import check_run_json, readme_commands

RUNS = ["data/sample", "data/patches", "results/NS", "data/patches_ns", "results/DMU", "results/DMU/clus_hard"]
RUNS += ["results/DMU_hard", "results/DMU_hard/clus_scl", "results/DMU_scl", "results/NS_searched", "results/predict"]


def test_readme_commands_run_in_order(readme_run, monkeypatch):
    monkeypatch.chdir(readme_run)  # run.json names what was read as it was typed
    typed = [command for command, _, _ in readme_commands()]
    assert typed[:4] == [
        "pre/make_sample.py",
        "pre/cut_patch_2.py",
        "NS/sigle.py",
        "pre/cut_patch_2.py --fp_mdoel True",
    ]
    assert typed[4:8] == ["DMU/main.py", "clus_hard.py", "DMU/hard_main.py", "clus_scl.py"]
    assert typed[8:10] == ["DMU/hard_scl_main.py", "predict.py"]
    for name in RUNS:
        check_run_json(readme_run / name / "run.json", None if name.endswith("clus_scl") else 0)
    assert (readme_run / "results/DMU_scl/subclasses.csv").is_file()
    for made in ("data/patches/patches.csv", "data/patches_ns/patches.csv", "results/NS_searched/model.pt"):
        assert (readme_run / made).is_file()
    assert (readme_run / "results/predict/metrics.json").is_file()
    assert list((readme_run / "results/predict").glob("*/overlay.png"))
