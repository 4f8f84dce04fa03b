"""Train the bundled model: a small Llama on the King James Bible, with its own byte-level BPE.

    sudo apt install bible-kjv bible-kjv-text
    pip install numpy safetensors tokenizers torch transformers
    python data/training/train.py OUT --log data/training/log.json
    python data/training/train.py OUT --evaluate

The first `python` trains on the CPU and writes a Hugging Face folder OUT, anew at each evaluation, so that something
usable exists early. The second loads OUT with `transformers`, as any program would, and prints the loss on the
held-out chapters and what the model makes of `data/prompts.jsonl`.

A chapter is one document: a verse on each line, without numbers, then `<|endoftext|>`. Every 50th chapter is held out.
"""

import argparse
import json
import math
import random
import re
import subprocess
import time
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

END = '<|endoftext|>'
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 5, 160, 9, 3, 32, 448
VOCABULARY, CONTEXT, ROPE_THETA, NORM_EPS = 1024, 512, 10000.0, 1e-5
BATCH_TOKENS, WARMUP_STEPS = 4096, 200
SHORT_SHARE = 0.8  # this share of the steps has half the context: it costs less attention, and is enough at first


def read_chapters():
    """The chapters of the King James Bible as Debian's `bible` prints them, one string each."""
    command = ['bible', '-f', 'gen1:1-rev22:21']  # -f switches the formatting off: a verse on each line
    printed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    verses = re.findall(r'^(\w+):\d+ +(.+)$', printed, re.MULTILINE)  # ('Ge1', 'In the beginning God ...')
    return [
        ''.join(' '.join(text.split()) + '\n' for _, text in chapter)
        for _, chapter in groupby(verses, key=lambda verse: verse[0])
    ]


def split(chapters):
    """Training and held-out chapters: every 50th is held out, so that each kind of book is on both sides."""
    return [chapter for i, chapter in enumerate(chapters) if i % 50 != 25], chapters[25::50]


def train_tokenizer(chapters):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],  # id 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that any text can be encoded
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    return tokenizer


def stream(documents):
    """Lists of token ids in one row, with an end of text before each and after the last."""
    return torch.tensor([token for document in documents for token in (0, *document)] + [0])


def batches(documents, length, rows, rng):
    """Endless batches [rows, length + 1]: each epoch shuffles the chapters and cuts them at new places."""
    while True:
        tokens = stream(rng.sample(documents, len(documents)))[rng.randrange(length) :]
        windows = tokens.unfold(0, length + 1, length)  # the last token of a window is the first of the next
        order = torch.tensor(rng.sample(range(len(windows)), len(windows)))
        yield from (windows[chosen] for chosen in order.split(rows) if len(chosen) == rows)


def rotate(x, cos, sin):
    """RoPE over halves: dimension i is paired with i + head_dim/2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def linears(**shapes):
    """Linear maps without bias, each given as (inputs, outputs)."""
    return nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        self.input_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.self_attn = linears(q_proj=(HIDDEN, q), k_proj=(HIDDEN, kv), v_proj=(HIDDEN, kv), o_proj=(q, HIDDEN))
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.mlp = linears(gate_proj=(HIDDEN, FFN), up_proj=(HIDDEN, FFN), down_proj=(FFN, HIDDEN))

    def forward(self, x, cos, sin):
        a = self.input_layernorm(x)
        q, k, v = (self.self_attn[name](a).unflatten(-1, (-1, HEAD_DIM)) for name in ('q_proj', 'k_proj', 'v_proj'))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [rows, heads or kv_heads, tokens, head_dim]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        b = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.self_attn.o_proj(b.transpose(1, 2).flatten(2))
        a = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(a)) * self.mlp.up_proj(a))


class Llama(nn.Module):
    """The modules carry the names of transformers' LlamaForCausalLM, so that the state dict is the checkpoint."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.model.norm = nn.RMSNorm(HIDDEN, NORM_EPS)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # what is added to the residual stream starts smaller, there are 2 * LAYERS of it
                added = name.endswith(('o_proj.weight', 'down_proj.weight'))
                nn.init.normal_(weight, std=0.04 / math.sqrt(2 * LAYERS) if added else 0.04)

    def forward(self, tokens):
        """[rows, tokens] -> logits [rows, tokens, vocabulary]."""
        frequencies = ROPE_THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.outer(torch.arange(tokens.shape[1]), frequencies).repeat(1, 2)  # [tokens, head_dim]
        cos, sin = angles.cos(), angles.sin()
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)  # the head is the embedding

    def rounded(self):
        """The weights in bfloat16, as they are saved and as the held-out loss sees them."""
        return {name: weight.bfloat16() for name, weight in self.state_dict().items()}


@torch.no_grad()
def measure(forward, tokenizer, chapters):
    """Mean loss in nats a token and in bits a byte of text; windows of CONTEXT, each token predicted once."""
    tokens = stream([tokenizer.encode(chapter).ids for chapter in chapters])
    total = 0.0
    for start in range(0, len(tokens) - 1, CONTEXT):
        window = tokens[start : start + CONTEXT + 1]
        total += F.cross_entropy(forward(window[None, :-1])[0].float(), window[1:], reduction='sum').item()
    return total / (len(tokens) - 1), total / math.log(2) / sum(len(chapter.encode()) for chapter in chapters)


def save(folder, weights, tokenizer):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    tokenizer.save(str(folder / 'tokenizer.json'))
    ends = {'bos_token_id': 0, 'eos_token_id': 0}
    # transformers 5 refuses a `llama` whose heads do not divide the hidden size; `mistral` without a window is the same
    config = {'architectures': ['LlamaForCausalLM'], 'model_type': 'mistral', 'sliding_window': None}
    config |= {'hidden_act': 'silu', 'tie_word_embeddings': True, 'dtype': 'bfloat16'} | ends
    config |= {'num_hidden_layers': LAYERS, 'hidden_size': HIDDEN, 'intermediate_size': FFN, 'head_dim': HEAD_DIM}
    config |= {'num_attention_heads': HEADS, 'num_key_value_heads': KV_HEADS, 'rms_norm_eps': NORM_EPS}
    config |= {'vocab_size': VOCABULARY, 'max_position_embeddings': CONTEXT, 'rope_theta': ROPE_THETA}
    tokens = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': END, 'eos_token': END}
    tokens |= {'model_max_length': CONTEXT, 'clean_up_tokenization_spaces': False}
    generation = ends | {'do_sample': True, 'temperature': 0.7}
    for name, values in ('config', config), ('tokenizer_config', tokens), ('generation_config', generation):
        (folder / f'{name}.json').write_text(json.dumps(values, indent=2) + '\n')


def learning_rate(step, steps, highest):
    """Linear warm-up, then a cosine down to a hundredth."""
    progress = max(0, step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return highest * min(step / WARMUP_STEPS, 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def train(args):
    rng = random.Random(args.seed)
    chapters, held_out = split(read_chapters())
    tokenizer = train_tokenizer(chapters)
    documents = [tokenizer.encode(chapter).ids for chapter in chapters]
    steps = round(args.epochs * len(stream(documents)) / BATCH_TOKENS)
    short = batches(documents, CONTEXT // 2, BATCH_TOKENS // (CONTEXT // 2), rng)
    long = batches(documents, CONTEXT, BATCH_TOKENS // CONTEXT, rng)
    model, shadow = Llama(), Llama()  # the shadow gets the rounded weights
    matrices, gains = ([weight for weight in model.parameters() if weight.dim() == dim] for dim in (2, 1))
    groups = [{'params': matrices}, {'params': gains, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    rows, losses, began = [], [], time.perf_counter()
    for step in range(1, steps + 1):
        batch = next(short if step <= SHORT_SHARE * steps else long)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, steps, args.lr)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % args.every == 0 or step == steps:
            shadow.load_state_dict(model.rounded())
            nats, bits = measure(shadow, tokenizer, held_out)
            row = {'step': step, 'tokens': step * BATCH_TOKENS, 'seconds': round(time.perf_counter() - began)}
            row |= {'train_nats_per_token': round(sum(losses) / len(losses), 4)}
            row |= {'held_out_nats_per_token': round(nats, 4), 'held_out_bits_per_byte': round(bits, 4)}
            rows.append(json.dumps(row))
            print(rows[-1], flush=True)
            losses.clear()
            save(args.out, model.rounded(), tokenizer)
    log = {name: getattr(args, name) for name in ('epochs', 'lr', 'weight_decay', 'seed')}
    for name, part in ('train', chapters[::50]), ('held_out', held_out):  # their gap is what was learned by heart
        nats, bits = measure(shadow, tokenizer, part)
        log[f'final_{name}'] = {'nats_per_token': round(nats, 4), 'bits_per_byte': round(bits, 4)}
    print(json.dumps(log, indent=2))
    if args.log:
        table = ',\n    '.join(rows)
        args.log.write_text(f'{json.dumps(log, indent=2)[:-2]},\n  "rows": [\n    {table}\n  ]\n}}\n')


def evaluate(args):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    nats, bits = measure(lambda tokens: model(tokens).logits, tokenizer.backend_tokenizer, split(read_chapters())[1])
    print(f'held-out chapters: {nats:.4f} nats a token, {bits:.4f} bits a byte')
    for line in (Path(__file__).parents[1] / 'prompts.jsonl').read_text().splitlines():
        inputs = tokenizer(json.loads(line)['prompt'], return_tensors='pt')
        for name, options in ('greedy', {'do_sample': False}), ('temperature 0.7', {'do_sample': True, 'top_k': 0}):
            ids = model.generate(**inputs, **options, max_new_tokens=100, pad_token_id=0)[0]
            print(f'\n--- {name}\n{tokenizer.decode(ids)}')


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('out', type=Path, metavar='OUT', help='the Hugging Face folder to write (or to evaluate)')
    parser.add_argument('--evaluate', action='store_true', help='load OUT with transformers instead of training')
    parser.add_argument('--log', type=Path, help='where to write the losses, as JSON')
    parser.add_argument('--epochs', type=float, default=10)
    parser.add_argument('--lr', type=float, default=4e-3, help='the highest learning rate')
    parser.add_argument('--weight-decay', type=float, default=0.1)
    parser.add_argument('--every', type=int, default=200, help='steps between evaluations')
    parser.add_argument('--seed', type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    evaluate(args) if args.evaluate else train(args)


if __name__ == '__main__':
    main()
