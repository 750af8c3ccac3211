"""The package as seen by users: public names, files, commands."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

import cotolora
from tests.support.repository import ROOT

NAMES = """
CoToLoRALinear coto_lora_linear inject eject adapters adapter_parameters lora_plus_groups trainable_parameters
trainable_report CoTo Schedule activation_probability sample_mask adapter_mask save_adapter load_adapter set_backend
explain stack __version__
"""


def test_public_names_are_the_promised_ones():
    assert set(cotolora.__all__) == set(NAMES.split())
    assert all(hasattr(cotolora, name) for name in cotolora.__all__)


def test_every_public_name_is_documented():
    undocumented = [name for name in cotolora.__all__ if name != "__version__" and not getattr(cotolora, name).__doc__]
    assert undocumented == []


def test_version_agrees_with_the_metadata():
    assert f'version = "{cotolora.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_the_package_imports_what_its_metadata_asks_for():
    metadata = (ROOT / "pyproject.toml").read_text()
    worked_with = {"transformers", "peft", "lightning"}  # imported only where a user has them
    extras = {
        "demo.py": {"einops", "sklearn", "matplotlib"},
        "results.py": {"PIL"},
        "plot.py": {"matplotlib"},
    }  # matplotlib brings PIL
    (dependencies,) = re.findall(r"^dependencies = (.*)$", metadata, flags=re.M)
    required = set(re.findall(r'"(\w+)>=', dependencies))
    used = set()
    for path in (ROOT / "cotolora").rglob("*.py"):
        if "kernels" in path.parts:
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"cotolora"}
        assert foreign <= required | worked_with | extras.get(path.name, set()), path
        used |= foreign
    assert required <= used


def test_kernels_is_a_relative_link_to_a_folder_without_init():
    link = ROOT / "cotolora" / "kernels"
    if not link.is_symlink():
        pytest.skip("this tree holds a copy instead of the link (made from an sdist)")
    assert os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_checkout_whose_link_to_the_kernels_became_a_text_file_runs_on_a_cpu(tmp_path):
    shutil.copytree(ROOT / "cotolora", tmp_path / "cotolora", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    (tmp_path / "cotolora" / "kernels").write_text("../kernels")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, cotolora, cotolora.merging, cotolora.pruning, cotolora.shapley, cotolora.connectivity\n"
        f"assert cotolora.__file__.startswith({str(tmp_path)!r}), cotolora.__file__\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))\n"
        "layers = cotolora.inject(model, 'all-linear')\n"
        "model(torch.ones(2, 4)).sum().backward()\n"
        "assert cotolora.explain(layers['0'], rows=2).backend == 'addmm'\n"
        # an editable install of the package would find the kernels elsewhere
        "assert not any(name.startswith('cotolora.kernels') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[demo]" && python -m cotolora.demo\n' in text
    assert 'pip install -e ".[test]" && pytest -n auto --dist loadfile\n' in text


def test_what_runs_before_a_commit_is_what_ci_runs():
    hooks = re.findall(r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.M)
    (lint,) = re.findall(r'^step "lint and types"\n(.*?)\n\n', (ROOT / ".ci" / "run").read_text(), re.M | re.S)
    assert hooks == [line for line in lint.splitlines() if not line.startswith("pip install")]
