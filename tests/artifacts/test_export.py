"""What was trained comes out: models that plain transformers loads, their tokenizers, their perplexity."""

import io
import json
import logging
import math
import resource
import subprocess
import sys

import pytest
import sentencepiece
import torch
import torch.distributed as dist
from tiny import ROOT, TINY, WORDS
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Tokenizer

from lrpretrain import cli, pretrain
from lrpretrain.artifacts.export import TEXTS, merge
from lrpretrain.data import tokenizer
from lrpretrain.data.fast import of_sentencepiece
from lrpretrain.data.loader import build_loader
from lrpretrain.errors import CheckpointError
from lrpretrain.model.llama import Llama, from_pretrained
from lrpretrain.model.lowrank import LowRankLinear
from lrpretrain.sharding.procs import Procs
from lrpretrain.train import trained

RULES = {
    "galore": {},
    "loro": {"optim__exact_every": 3},
    "gradnormlorp": {},
    "dora": {"optim__mode": "dora", "optim__adapter_rank": 4, "optim__adapter_alpha": 8.0},
    "bfloat16": {"precision__params": "bfloat16", "precision__compute": "bfloat16"},
}
IDS = torch.randint(TINY["vocab_size"], (3, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def runs(bench):
    """The folder with a run of six steps for every rule, evaluated at its end."""
    start = bench.folder / "start"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(start)
    for name, more in RULES.items():
        argv = bench.options(
            f"export-{name}",
            optim__rule={"dora": "gradnormlorp", "bfloat16": "loro"}.get(name, name),
            model__init_from=start if name == "dora" else None,
            train__steps=6,
            train__warmup_steps=1,
            train__eval_every=6,
            train__eval_tokens=1500,
            data__sequences="pad" if name == "galore" else "pack",
            **more,
        )
        assert pretrain.main(argv) == 0
        dist.destroy_process_group()
    return bench.folder


@pytest.fixture
def run(capsys):
    """Return a function that runs a tool and returns (exit code, stdout, stderr)."""

    def run(*argv):
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as exit:  # argparse
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    logging.getLogger("lrpretrain").setLevel(logging.NOTSET)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def of_checkpoint(folder):
    return logits(trained.find(folder).model())


def evaluate(run, *argv):
    code, out, err = run("eval", *argv, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("name", RULES)
def test_a_dense_export_is_the_model(run, runs, bench, tmp_path, name):
    folder, out = runs / f"export-{name}", tmp_path / "new" / "out"
    code, said, err = run("export", folder, out)
    assert (code, err) == (0, "")
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    assert (
        said == f"wrote {out}: the model of {folder / 'checkpoints' / 'step_00000006'}, dense, in {dtype}\n"
    )
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert (config["dtype"], config["eos_token_id"], config["pad_token_id"]) == (dtype, 1, 0)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    assert type(model) is LlamaForCausalLM and str(model.dtype) == f"torch.{dtype}"
    # Merged in float32 and rounded once: of a model in bfloat16 the products of factors are.
    tolerance = {"rtol": 0, "atol": 2e-2} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(logits(model.float()), of_checkpoint(folder), **tolerance)
    # The same configuration gives the loss that the run logged, from either.
    logged = bench.metrics(folder.name)[-1]
    found = evaluate(run, folder)
    assert found["valid/targets"] == logged["valid/targets"] > 1400
    assert found["valid/loss"] == pytest.approx(logged["valid/loss"], rel=1e-6)
    assert found["valid/ppl"] == pytest.approx(logged["valid/ppl"], rel=1e-6)
    saved = trained.find(folder).config
    data = {
        "source": "files",
        "path": bench.text,
        "sequences": saved.data.sequences,
        "seq_len": 32,
        "lanes": 6,
    }
    argv = [f"--data.{key}={value}" for key, value in data.items()]
    argv += ["--train.micro_batch=2", "--train.global_batch=12", "--tokens", 1500]
    again = evaluate(run, out, *argv)
    assert again["valid/targets"] == found["valid/targets"]
    assert again["valid/loss"] == pytest.approx(
        found["valid/loss"], rel=1e-3 if dtype == "bfloat16" else 1e-6
    )


def test_plain_transformers_goes_on_from_a_prompt(run, runs, bench, tmp_path):
    out = tmp_path / "out"
    assert run("export", runs / "export-dora", out, "--shard_size", "60KB")[0] == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (out / "model.safetensors.index.json").is_file()
    script = (
        "import sys, json, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, ids = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))\n"
        "text = ids('the gradient of', return_tensors='pt')\n"
        "written = model.generate(**text, max_new_tokens=12, do_sample=False)[0]\n"
        "assert not any(name.startswith('lrpretrain') for name in sys.modules)\n"
        "torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])\n"
        "print(json.dumps([model.generation_config.eos_token_id, model.generation_config.pad_token_id,"
        " ids.decode(written, skip_special_tokens=True)]))\n"
    )
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", script, out, tmp_path / "ids.pt", tmp_path / "logits.pt"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), of_checkpoint(runs / "export-dora"), rtol=1e-5, atol=1e-5
    )
    ours = run("generate", runs / "export-dora", "the gradient of", "--tokens", 12)
    assert json.loads(said) == [1, 0, ours[1].removesuffix("\n")]
    assert run("generate", out, "the gradient of", "--tokens", 12) == ours


def test_factors_stay_factors(run, runs, tmp_path):
    folder, out, dense = runs / "export-loro", tmp_path / "out", tmp_path / "dense"
    assert run("export", folder, out, "--form", "factored")[0] == 0
    model = from_pretrained(out)
    assert type(model) is Llama
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) == 14
    for name, param in trained.find(folder).model().named_parameters():
        assert torch.equal(model.get_parameter(name), param), name
    assert torch.equal(logits(model), of_checkpoint(folder))
    with pytest.raises(ValueError, match="llama_lowrank"):  # never filled at random
        AutoModelForCausalLM.from_pretrained(out)
    assert (
        AutoTokenizer.from_pretrained(out).encode("the rank")
        == AutoTokenizer.from_pretrained(out)("the rank")["input_ids"]
    )
    assert run("export", out, dense, "--dtype", "bfloat16")[0] == 0  # from there to dense
    torch.testing.assert_close(logits(from_pretrained(dense)), of_checkpoint(folder), rtol=0, atol=2e-2)


def test_nothing_is_written_by_halves(run, runs, tmp_path, monkeypatch):
    taken, folder = tmp_path / "taken", runs / "export-galore"
    taken.mkdir()
    assert run("export", folder, taken)[0] == 0  # an empty folder is no obstacle
    before = sorted(taken.iterdir())
    for code, message, argv in [
        (2, "is there already, and not empty. Name another", [folder, taken]),
        (
            2,
            "the model has no low-rank factors. Use --form dense",
            [folder, tmp_path / "a", "--form", "factored"],
        ),
        (2, "was trained with sha256:", [folder, tmp_path / "a", "--tokenizer", taken]),
        (2, "'5 GB' is not a size such as", [folder, tmp_path / "a", "--shard_size", "5 GB"]),
        (4, "neither a checkpoint nor a run folder", [tmp_path, tmp_path / "a"]),
    ]:
        found, _, err = run("export", *argv)
        assert (found, message in err) == (code, True), err
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))  # as a full disk: the weights do not fit
    try:
        code, _, err = run("export", folder, tmp_path / "a", "--no_tokenizer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 3 and "lrpretrain: " in err, err
    monkeypatch.setattr("lrpretrain.data.tokenizer.of_sentencepiece", lambda proto: other_tokenizer())
    code, _, err = run("export", folder, tmp_path / "a")
    assert code == 2 and "gives other ids than the run's for ' '" in err and "--no_tokenizer" in err, err
    assert sorted(tmp_path.iterdir()) == [taken] and sorted(taken.iterdir()) == before


def other_tokenizer():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 3),
        model_writer=model,
        vocab_size=38,
        pad_id=3,
        minloglevel=2,
    )
    return of_sentencepiece(model.getvalue())


@pytest.mark.parametrize("kind", ["bpe", "unigram", "unigram with bytes"])
def test_a_sentencepiece_model_in_the_tokenizers_library(bench, kind):
    model = io.BytesIO()
    texts = [line for line in (ROOT / "README.md").read_text().splitlines() if "</s>" not in line]
    bytes_ = {"byte_fallback": True, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type=kind.split()[0],
        vocab_size=900,
        minloglevel=2,
        **(bytes_ if kind != "unigram" else {}),  # without, as T5's: compatible characters, single spaces
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = of_sentencepiece(model.getvalue())
    assert len(texts) > 200
    for text in (*TEXTS, *texts):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text), text
        if theirs.unk_id() not in ids and "▁" not in text:
            assert ours.decode(ids) == theirs.decode(ids), text


def test_a_tokenizer_of_the_hub_loses_what_the_model_lacks(run, runs, bench, tmp_path):
    """T5's: sentinels above the vocabulary, and an eos that transformers adds by itself."""
    vocabulary = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")] + [
        (f"▁{word}", -1.0) for word in WORDS
    ]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in (99, 98)]
    t5 = T5Tokenizer(vocab=vocabulary + sentinels, extra_ids=2)
    t5.save_pretrained(tmp_path / "t5")
    size = len(vocabulary)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | {"vocab_size": size}))
    argv = bench.options("of-t5", model__config=tmp_path / "tiny.json", data__tokenizer=tmp_path / "t5")
    assert pretrain.main([*argv, "--train.steps=4"]) == 0
    dist.destroy_process_group()
    assert run("export", runs / "of-t5", tmp_path / "out")[0] == 0
    text = "the rank of a <extra_id_0> matrix"
    read, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), tokenizer.load(str(tmp_path / "t5"), size)
    assert t5(text)["input_ids"][-1] == ours.encode(text)[-1] == read.eos_token_id == 1
    assert max(t5(text)["input_ids"]) >= size == len(read) > max(read(text)["input_ids"])
    assert read("the rank of a matrix")["input_ids"] == ours.encode("the rank of a matrix")[:-1].tolist()
    assert evaluate(run, runs / "of-t5", "--tokens", 500)["valid/loss"] < 10


def test_evaluation_on_another_source(run, runs, bench, tmp_path, monkeypatch):
    folder = runs / "export-galore"
    own = evaluate(run, folder)
    for split in ("train", "validation"):
        argv = ["--path", bench.text, "--tokenizer", bench.tokenizer, "--vocab_size", 300, "--split", split]
        assert run("tokenize", tmp_path / "ids", *argv)[0] == 0
    tokens = ["--data.source", "tokens", "--data.path", tmp_path / "ids"]
    found = evaluate(run, folder, *tokens)
    assert {**found, "perf/eval_s": 0} == {**own, "perf/eval_s": 0, "data.source": "tokens"}
    monkeypatch.setattr("lrpretrain.data.sample.corpus", lambda cache: bench.text)
    found = evaluate(run, folder, "--data.source", "sample", "--tokens", 500)  # not at the path of the run
    assert 450 < found["valid/targets"] < own["valid/targets"]
    assert evaluate(run, folder, "--data.sequences", "pack")["valid/loss"] != own["valid/loss"]
    assert evaluate(run, folder, "--precision.compute", "bfloat16")["valid/loss"] == pytest.approx(
        own["valid/loss"], rel=1e-2
    )
    code, table, _ = run("eval", folder)
    assert code == 0
    assert f"perplexity              {own['valid/ppl']:10.4f}   loss {own['valid/loss']:.6f}" in table
    assert f"{own['valid/biased_ppl']:10.4f}   loss {own['valid/biased_loss']:.6f}" in table


def test_the_authors_figure(run, runs):
    """By hand: batch by batch as their scripts do, with their model's own mean loss, counting from 1."""
    found = evaluate(run, runs / "export-galore")
    model = trained.find(runs / "export-galore")
    ids = model.tokenizer()
    loader = build_loader(model.config, "validation", Procs(), ids)
    network = merge(model.model(), model.shape)
    total, batches, tokens = 0.0, 1, 0
    while tokens < model.config.train.eval_tokens and (batch := loader.next()) is not None:
        tokens += batch.tokens
        for rows in torch.from_numpy(batch.ids).split(model.config.train.micro_batch):
            labels = rows.masked_fill(rows == ids.pad_id, -100)
            if (labels[:, 1:] >= 0).any():
                with torch.no_grad():
                    total += float(network(input_ids=rows, labels=labels).loss)
                batches += 1
    loader.close()
    assert batches > 10
    assert found["valid/biased_loss"] == pytest.approx(total / batches, rel=1e-6)
    assert found["valid/biased_ppl"] == pytest.approx(math.exp(total / batches), rel=1e-5)
    assert found["valid/biased_loss"] < found["valid/loss"]


def test_evaluations_that_cannot_be(run, runs, bench, tmp_path):
    folder, out = runs / "export-galore", tmp_path / "out"
    assert run("export", folder, out, "--no_tokenizer")[0] == 0
    assert not list(out.glob("token*"))
    other = bench.folder / "of-another.model"
    tokenizer.train([" ".join(WORDS)] * 3, other, 285)
    files = ["--data.source=files", f"--data.path={bench.text}", "--data.seq_len=32"]
    for code, message, argv in [
        (2, "optim.rank=8: is settled by the model", [folder, "--optim.rank", 8]),
        (2, "Perhaps data.path is meant", [folder, "--data.pth", "x"]),
        (2, "longer than the model's 64 positions", [folder, "--data.seq_len", 100]),
        (2, "was trained with sha256:", [folder, "--data.tokenizer", other]),
        (2, "holds no tokenizer. Name the one", [out, "--data.seq_len=32"]),
        (2, "text needs a tokenizer", [out, *files]),
        (3, "no validation shards", [folder, "--data.path", tmp_path]),
        (4, "neither a checkpoint", [tmp_path]),
    ]:
        found, said, err = run("eval", *argv)
        assert (found, said, message in err) == (code, "", True), err
    argv = [*files, f"--data.tokenizer={bench.tokenizer}", "--tokens", 500]
    assert evaluate(run, out, *argv)["valid/loss"] > 1


def test_a_merge_that_changes_the_model_is_found(runs):
    found = trained.find(runs / "export-loro")
    broken = found.model()
    layer = broken.model.layers[1].mlp.up_proj
    layer.forward = lambda x: x @ layer.weight_in @ layer.weight_out.T * 1.01
    with pytest.raises(CheckpointError, match=r"differ from the checkpoint's by \d\.\de-0\d of their norm"):
        merge(broken, found.shape)
    infinite = found.model()
    nn.init.constant_(infinite.lm_head.weight, torch.nan)
    with pytest.raises(CheckpointError, match="by nan of their norm"):
        merge(infinite, found.shape)
