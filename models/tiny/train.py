"""Train a tiny model on the made-up corpus: python models/tiny/train.py --arch mpt

Fits a byte-level BPE tokenizer and a stock transformers model on freshly generated reports,
dialogues and questions (corpus.py) and writes a folder that from_pretrained loads. The recipe is
the same for every architecture and takes a few minutes on one data-center GPU.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import keyformer  # noqa: F401 - before transformers, to keep it quiet

# isort: split
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

from keyformer.config import InputError
from keyformer.integration import check_device
from keyformer_evaluation.records.results import check_writable
from keyformer_evaluation.tasks.data import TASKS
from keyformer_evaluation.tasks.flags import SEED, Parser, real, run_main, whole
from tiny.corpus import KINDS, SHAPES, document, options

EOS = "<|endoftext|>"
PAD_TO = 32  # batch lengths are multiples of this: few distinct attention biases, aligned kernels
PROMPT, RESPONSE = 1, 2  # what a token belongs to; 0 is padding
TASK_OF = {"news": TASKS["summarization"], "dialogue": TASKS["conversation"]}
COMMAND = "python models/tiny/train.py"  # by which a card tells whose model it is about
SHOTS = 6  # most questions in one example: five answered ones and the last
# The kinds of training documents, in turn.
MIXTURE = tuple(kind for shape in SHAPES for kind in ("news", "news", "dialogue", shape))


def fit_tokenizer(vocab_size: int, documents: int) -> Tokenizer:
    """A byte-level BPE over the first `documents` training documents.

    Digits stand alone, so that a figure is copied digit by digit rather than as a rare token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ("".join(training_example(n)) for n in range(documents))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def example(kind: str, split: str, index: int, filler: float = 1.0) -> tuple[str, str]:
    """A document's prompt and reference; the model learns the second given the first."""
    if kind in SHAPES:
        return few_shot(kind, split, index, filler)
    made = document(split, index, filler, kind)
    return TASK_OF[kind].prompt(made), TASK_OF[kind].reference(made)


def few_shot(shape: str, split: str, index: int, filler: float) -> tuple[str, str]:
    """A question after up to five others with their answers, fewer with less filler."""
    before = round(filler * (index % SHOTS))
    texts = []
    for i in range(index * SHOTS, index * SHOTS + before + 1):
        choices, gold = options(shape, document(split, i, kind=shape))
        prompt, answer = choices[gold]
        texts.append(f"{prompt} {answer}")
    return "\n\n".join([*texts[:-1], prompt]), f" {answer}"


def training_example(n: int, filler: float = 1.0) -> tuple[str, str]:
    """The example `n` of the mixture of kinds."""
    turn, place = divmod(n, len(MIXTURE))
    kind = MIXTURE[place]
    return example(kind, "train", turn if kind in SHAPES else n, filler)


class Batches(IterableDataset):
    """Endless right-padded batches of fresh documents: (ids, parts), both [batch, length].

    Each document of the mixture is used once. They are drawn a pool at a time and batched with
    others of their length, so that little is padding. parts holds 0, PROMPT or RESPONSE.
    """

    POOL = 1024

    def __init__(self, tokenizer: Tokenizer, first: int, batch_tokens: int, ramp: int) -> None:
        self.tokenizer, self.first = tokenizer, first
        self.batch_tokens, self.ramp = batch_tokens, ramp

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        order = torch.Generator().manual_seed(worker)
        at = worker * self.POOL  # a pool is a run of numbers, hence holds every kind
        while True:
            pool = [
                training_example(self.first + n, self.filler(n)) for n in range(at, at + self.POOL)
            ]
            at += self.POOL * workers
            batches = batched(self.tokenizer, pool, self.batch_tokens)
            for b in torch.randperm(len(batches), generator=order).tolist():
                yield pad(batches[b])

    def filler(self, n: int) -> float:
        """Short documents first: copying is found sooner where there is less to search."""
        return min(1.0, max(0.05, (n + 1) / self.ramp))


Row = tuple[list[int], int]  # token ids, prompt length


def batched(
    tokenizer: Tokenizer, examples: list[tuple[str, str]], batch_tokens: int
) -> list[list[Row]]:
    """The examples, shortest first, in batches of at most `batch_tokens`, padding included."""
    prompts = tokenizer.encode_batch([prompt for prompt, _ in examples])
    outputs = tokenizer.encode_batch([output + EOS for _, output in examples])
    rows = [(p.ids + o.ids, len(p.ids)) for p, o in zip(prompts, outputs, strict=True)]
    rows.sort(key=lambda row: len(row[0]))
    batches: list[list[Row]] = [[]]
    for row in rows:
        if batches[-1] and (len(batches[-1]) + 1) * padded(len(row[0])) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def padded(length: int) -> int:
    """The length of a batch whose longest row has `length` tokens."""
    return -(-length // PAD_TO) * PAD_TO


def pad(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as right-padded (ids, parts), int16 and uint8 [rows, length]."""
    length = padded(max(len(ids) for ids, _ in rows))
    batch = torch.zeros(len(rows), length, dtype=torch.int16)  # small: it crosses processes
    parts = torch.zeros(len(rows), length, dtype=torch.uint8)
    for row, (ids, prompt) in enumerate(rows):
        batch[row, : len(ids)] = torch.tensor(ids)
        parts[row, :prompt] = PROMPT
        parts[row, prompt : len(ids)] = RESPONSE
    return batch, parts


def build_mpt(args: argparse.Namespace, tokens: dict[str, int]) -> MptForCausalLM:
    """MPT with its stock attention settings (ALiBi, no biases)."""
    config = MptConfig(
        d_model=args.d_model, n_layers=args.n_layers, n_heads=args.n_heads, expansion_ratio=4,
        max_seq_len=2048, use_cache=True, **tokens,
    )  # fmt: skip
    return MptForCausalLM(config)


def build_gptj(args: argparse.Namespace, tokens: dict[str, int]) -> GPTJForCausalLM:
    """GPT-J; half of each head is rotated, the other half can match content at any distance."""
    config = GPTJConfig(
        n_embd=args.d_model, n_layer=args.n_layers, n_head=args.n_heads, n_positions=2048,
        rotary_dim=args.d_model // args.n_heads // 2, tie_word_embeddings=True,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens,
    )  # fmt: skip
    return GPTJForCausalLM(config)


def build_cerebras(args: argparse.Namespace, tokens: dict[str, int]) -> GPT2LMHeadModel:
    """GPT-2 as Cerebras-GPT has it: an exact GELU and learned positions."""
    config = GPT2Config(
        n_embd=args.d_model, n_layer=args.n_layers, n_head=args.n_heads, n_positions=1280,
        activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@cache
def alibi_bias(model: MptForCausalLM, length: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Causal ALiBi bias [1, heads, length, length]; entry (i, j) is slope * (j - i) or -inf."""
    alibi = model.transformer.build_mpt_alibi_tensor(model.config.n_heads, length).to(device)
    future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    # relative to the query, where low precision keeps the near, heavy entries exact
    return (alibi - alibi.transpose(1, 2)).masked_fill(future, -math.inf).to(dtype)[None]


def mpt_hidden(model: MptForCausalLM, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Last hidden states [batch, length, d_model] of stock weights with fused attention.

    The stock forward materializes all scores; this walks the same modules and leaves the scores to
    scaled_dot_product_attention. `dtype` is the one attention computes in.
    """
    batch, length = ids.shape
    bias = alibi_bias(model, length, str(ids.device), dtype)
    x = model.transformer.wte(ids)
    for block in model.transformer.blocks:
        attn = block.attn
        qkv = attn.Wqkv(block.norm_1(x)).view(batch, length, 3, attn.n_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.softmax_scale)
        x = x + attn.out_proj(y.transpose(1, 2).reshape(batch, length, -1))
        x = block.ffn(block.norm_2(x), x)
    return model.transformer.norm_f(x)


def gptj_hidden(model: GPTJForCausalLM, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `mpt_hidden`: the stock forward of GPT-J materializes all scores too."""
    batch, length = ids.shape
    x = model.transformer.wte(ids)
    for block in model.transformer.h:
        attn, turned, normed = block.attn, block.attn.rotary_dim, block.ln_1(x)
        sin, cos = attn.embed_positions[None, :length].chunk(2, dim=-1)
        q, k, v = (
            project(normed).view(batch, length, attn.num_attention_heads, attn.head_dim)
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = (
            torch.cat([apply_rotary_pos_emb(t[..., :turned], sin, cos), t[..., turned:]], dim=-1)
            for t in (q, k)
        )
        q, k, v = (t.transpose(1, 2).to(dtype) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attn.out_proj(y.transpose(1, 2).reshape(batch, length, -1)) + block.mlp(normed)
    return model.transformer.ln_f(x)


def gpt2_hidden(model: GPT2LMHeadModel, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `mpt_hidden`, with transformers' own fused attention; autocast chooses its dtype."""
    embeds = model.transformer.wte(ids)  # of ids themselves it would check whether they are padded
    return model.transformer(inputs_embeds=embeds, use_cache=False).last_hidden_state


class Arch(NamedTuple):
    """What training needs to know of an architecture."""

    name: str
    build: Callable[[argparse.Namespace, dict[str, int]], PreTrainedModel]
    hidden: Callable[[PreTrainedModel, torch.Tensor, torch.dtype], torch.Tensor]


ARCHS = {
    "mpt": Arch("MPT", build_mpt, mpt_hidden),
    "gptj": Arch("GPT-J", build_gptj, gptj_hidden),
    "cerebras": Arch("Cerebras-GPT", build_cerebras, gpt2_hidden),
}


def token_losses(
    arch: Arch, model: PreTrainedModel, ids: torch.Tensor, amp: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token loss and whether the top guess is right, both [batch, length - 1]."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=amp):
        hidden = arch.hidden(model, ids, torch.bfloat16 if amp else torch.float32)
        logits = model.lm_head(hidden[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids.shape[0], -1), logits.argmax(-1) == ids[:, 1:]


def learning_rate(args: argparse.Namespace, step: int, progress: float) -> float:
    """Linear warmup, then a cosine over progress in [0, 1] down to 2 % of --lr."""
    return (
        args.lr
        * min(1.0, (step + 1) / args.warmup)
        * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))))
    )


def train(
    args: argparse.Namespace, arch: Arch, model: PreTrainedModel, tokenizer: Tokenizer
) -> tuple[int, int, float]:
    """Train in place; (steps, tokens without padding, last logged response loss)."""
    amp = args.device.startswith("cuda")
    decay = [p for p in model.parameters() if p.dim() >= 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=amp)
    weight_of = torch.tensor([0.0, args.prompt_weight, 1.0], device=args.device)
    batches = Batches(tokenizer, args.seed * 10**9, args.batch_tokens, args.ramp)
    loader = DataLoader(
        batches, batch_size=None, num_workers=args.workers, pin_memory=amp,
        prefetch_factor=4 if args.workers else None,
    )  # fmt: skip
    tokens, step, response_loss, start = 0, 0, math.nan, time.time()
    for ids, parts in loader:
        # the schedule follows steps or time, whichever is ahead, so that it always ends
        progress = max(step / args.steps, (time.time() - args.start) / (60 * args.max_minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, progress)
        tokens += int((parts > 0).sum())
        ids, parts = (t.to(args.device, non_blocking=True).long() for t in (ids, parts))
        losses, hits = token_losses(arch, model, ids, amp)
        weights = weight_of[parts[:, 1:]]
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % args.log_every == 0 or step == args.steps:
            prompt, response_loss, accuracy = part_means(losses, hits, parts[:, 1:])
            rate = tokens / (time.time() - start)
            print(
                f"step {step} prompt {prompt:.3f} response {response_loss:.4f} copy {accuracy:.4f} "
                f"lr {group['lr']:.1e} {rate:,.0f} tokens/s {time.time() - args.start:.0f} s",
                flush=True,
            )
    return step, tokens, response_loss


def part_means(
    losses: torch.Tensor, hits: torch.Tensor, parts: torch.Tensor
) -> tuple[float, float, float]:
    """Mean loss of prompt tokens, of response tokens, and the latter's top-1 accuracy."""
    prompt, response = parts == PROMPT, parts == RESPONSE
    return (
        losses[prompt].mean().item(),
        losses[response].mean().item(),
        hits[response].float().mean().item(),
    )


@torch.no_grad()
def held_out(
    args: argparse.Namespace, arch: Arch, model: PreTrainedModel, tokenizer: Tokenizer, kind: str
) -> tuple[float, float, float]:
    """part_means over --eval_documents documents of a kind of the eval split."""
    examples = [example(kind, "eval", i) for i in range(args.eval_documents)]
    kept = []
    for rows in batched(tokenizer, examples, args.batch_tokens):
        ids, parts = (t.to(args.device).long() for t in pad(rows))
        losses, hits = token_losses(arch, model, ids, args.device.startswith("cuda"))
        kept.append((losses.flatten(), hits.flatten(), parts[:, 1:].flatten()))
    return part_means(*(torch.cat(column) for column in zip(*kept, strict=True)))


CARD = """---
license: mit
language: en
---
# A tiny {arch} model for made-up news reports, dialogues and questions

{parameters:,} parameters, trained from scratch on documents generated by `models/tiny/corpus.py`:
it summarizes reports, continues dialogues and answers questions about short reports, to show on a
CPU what KV-cache eviction does to each. It knows nothing else. Prompts are those of
`keyformer_evaluation.tasks.data.TASKS` and of `lm_eval_harness/tasks`.

| | |
| --- | --- |
| command | `{command}` |
| steps | {steps} |
| training tokens | {tokens:,} |
| train loss, response tokens (last logged batch) | {train_loss:.4f} |
| hardware | {hardware}, {minutes:.1f} minutes |

| held out | loss, response tokens | top-1 accuracy | loss, prompt tokens |
| --- | --- | --- | --- |
{held_out}

Held-out documents share no full name of a person, place, river or organisation with training ones.
"""


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, card: str
) -> None:
    """Write the model (float16), tokenizer and card; files appear only once all are complete.

    Other files of the folder stay.
    """
    model = model.half().cpu()
    if not all(p.isfinite().all() for p in model.parameters()):
        raise InputError("weights do not fit float16, nothing was saved: try a lower --lr")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as made:
        partial = Path(made)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card)
        for file in partial.iterdir():
            file.replace(folder / file.name)


def is_ours(folder: Path) -> bool:
    """Whether a folder is empty, or yet to be made, or has the card of a model made here."""
    card = folder / "README.md"
    if card.is_file():
        return COMMAND.encode() in card.read_bytes()
    return not folder.is_dir() or not any(folder.iterdir())


def check_lengths(args: argparse.Namespace, tokenizer: Tokenizer, table: int | None) -> None:
    """Refuse a vocabulary whose documents are longer than the model's table of positions.

    Raises
    ------
    InputError
        If one of a few documents of every kind is.
    """
    if table is None:
        return
    examples = [example(kind, "eval", i) for kind in KINDS for i in range(10 * SHOTS)]
    rows = (row for rows in batched(tokenizer, examples, args.batch_tokens) for row in rows)
    longest = max(len(ids) for ids, _ in rows)
    if longest > table:
        raise InputError(
            f"--vocab_size {args.vocab_size} makes documents of up to {longest} tokens, and"
            f" --arch {args.arch} has {table} positions"
        )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exit status 2 or InputError on bad arguments."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arch", choices=list(ARCHS), default="mpt")
    parser.add_argument("--output_dir", type=Path, help="default: models/ARCH-tiny-keyformer")
    parser.add_argument("--steps", type=whole(1), default=13_000)
    parser.add_argument(
        "--max_minutes", type=real(0, 1e6, above=True), default=8.5, help="stop training by then"
    )
    parser.add_argument(
        "--batch_tokens", type=whole(1, 2**24), default=65_536, help="padding included"
    )
    parser.add_argument("--lr", type=real(0, 1, above=True), default=1e-3)
    parser.add_argument("--warmup", type=whole(1), default=300, help="steps")
    parser.add_argument(
        "--prompt_weight", type=real(0, 1000), default=0.2, help="loss, response has 1"
    )
    parser.add_argument(
        "--ramp", type=whole(1), default=250_000, help="documents until full length"
    )
    parser.add_argument("--d_model", type=whole(1, 2**14), default=256)
    parser.add_argument("--n_layers", type=whole(1, 1024), default=6)
    parser.add_argument("--n_heads", type=whole(1, 1024), default=8)
    # At least all bytes and the end of a text, at most what a batch's int16 holds.
    parser.add_argument("--vocab_size", type=whole(257, 2**15), default=2048)
    parser.add_argument("--tokenizer_documents", type=whole(1), default=6000)
    parser.add_argument("--eval_documents", type=whole(1), default=512)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=whole(0, 256), default=min(14, (os.cpu_count() or 1) - 1))
    parser.add_argument("--log_every", type=whole(1), default=100)
    args = parser.parse_args(argv)
    check_device(args.device)
    size, rest = divmod(args.d_model, args.n_heads)
    if rest or (args.arch == "gptj" and size % 4):  # of which half is rotated, in pairs
        kind = "multiple of 4 times" if args.arch == "gptj" else "multiple of"
        raise InputError(f"--d_model must be a {kind} --n_heads {args.n_heads}, got {args.d_model}")
    args.output_dir = args.output_dir or Path(f"models/{args.arch}-tiny-keyformer")
    if not is_ours(args.output_dir):
        parser.error(f"--output_dir {args.output_dir} holds something, and no model made here")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and save a model as the command line says."""
    args = parse_args(argv)
    check_writable(args.output_dir, folder=True)
    args.start = time.time()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the loader's workers are the parallelism
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = fit_tokenizer(args.vocab_size, args.tokenizer_documents)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS,
        padding_side="left", model_max_length=2048,
    )  # fmt: skip
    arch = ARCHS[args.arch]
    eos = fast.eos_token_id
    tokens = {"vocab_size": args.vocab_size, "bos_token_id": eos, "eos_token_id": eos}
    model = arch.build(args, tokens | {"pad_token_id": eos}).to(args.device)
    check_lengths(args, tokenizer, getattr(model.config, "n_positions", None))
    model.eval()  # there is no dropout; train mode would only cost time
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.arch}: {parameters:,} parameters, tokenizer in {time.time() - args.start:.0f} s")
    steps, tokens_seen, train_loss = train(args, arch, model, tokenizer)
    rows = []
    for kind in KINDS:
        prompt, response, accuracy = held_out(args, arch, model, tokenizer, kind)
        rows.append(f"| {kind} | {response:.4f} | {accuracy:.4f} | {prompt:.4f} |")
        print(f"held-out {kind}: prompt {prompt:.3f} response {response:.4f} copy {accuracy:.4f}")
    cuda = args.device.startswith("cuda")
    options = sys.argv[1:] if argv is None else argv
    card = CARD.format(
        arch=arch.name,
        parameters=parameters,
        command=" ".join([COMMAND, *options]),
        steps=steps,
        tokens=tokens_seen,
        train_loss=train_loss,
        held_out="\n".join(rows),
        hardware=torch.cuda.get_device_name(args.device) if cuda else "CPU",
        minutes=(time.time() - args.start) / 60,
    )
    save(args.output_dir, model, fast, card)
    print(f"saved {args.output_dir} after {time.time() - args.start:.0f} s")


if __name__ == "__main__":
    run_main(main)
