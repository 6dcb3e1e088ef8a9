"""What happens before the model is built: ranks meet, text becomes tokens, the engine's libraries start, the run opens.

The order matters: data is tokenized while nothing can time out, and only then the process group starts.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.verification import Layout
from trainer.data import dataset, python_docs, tokenizer
from trainer.data.dataset import TokenizedDataset
from trainer.data.rows import PREFERENCES
from trainer.distributed import compilation, deepspeed_config, devices, heartbeat
from trainer.distributed.communication_time import CommunicationTimer
from trainer.distributed.muon import use_muon
from trainer.distributed.ranks import PREPARING_LIMIT_S, Ranks
from trainer.errors import UserError
from trainer.estimate.batch import default_global_batch
from trainer.exchange import allowed, start
from trainer.flags import dataset_words
from trainer.flags.transformers_fields import MUON
from trainer.model import from_config, isolation, loading, lora
from trainer.model.shape import shape_of
from trainer.options import Options, with_defaults
from trainer.preference import pairs
from trainer.results.console import Console, silence_libraries
from trainer.results.run_folder import RunFolder, find_run, make_private
from trainer.results.setup import Hardware, Setup, global_batch_size, row_tokens, writes
from trainer.sequences import mixture
from trainer.training import memory_report, split_building
from trainer.training.arguments import check_compiler, check_optimizer, check_packages
from trainer.training.resume import adapt_to_ranks, choose_checkpoint


def prepare(options: Options, ranks: Ranks, console: Console, ds_config: dict[str, Any] | None
            ) -> tuple[Setup, CommunicationTimer]:
    """Do everything up to the model; return what the ranks have agreed on, and what measures their waiting."""
    check_packages(options, ranks.is_first)
    options = lora.settle(options)
    lora.check(options, ds_config)
    options, hardware = agree_on_hardware(options, ranks, ds_config)
    check_compiler(options, hardware.device)
    check_optimizer(options, hardware.device)
    allowed.check(options, ds_config, hardware.precision)
    config = loading.load_config(options)
    if options.config_overrides:
        config = from_config.overridden(config, options.config_overrides)
    length = loading.choose_sequence_length(options, config)
    if config is not None and not options.no_packing and options.method != "dpo":
        isolation.check_family(config)
    data = make_data(options, ranks, console, config, length)
    options = settle_method(options, data)
    shape = shape_of(config, tokenizer.own_vocabulary(options, config))
    if options.split_layers is not None:
        options, batch_reason = split_building.settle_batch(
            options, shape, hardware, length,
            default_global_batch(length, sequences_of(data, options, length)), ranks), ""
    else:
        options, batch_reason = memory_report.settle_batch(options, shape, hardware, ds_config,
                                                           row_tokens(options, length),
                                                           sequences_of(data, options, length), ranks.world_size,
                                                           start.engine_ranks(options, ranks))
        memory_report.stop_if_too_large(options, shape, hardware, ds_config, length, ranks.world_size)
    if ds_config is not None and not ranks.on_one_machine and not options.lan_compress:
        deepspeed_config.send_gradients_in_bf16(ds_config, hardware.precision)
    if ds_config is not None and options.optim == MUON:
        use_muon(ds_config, options, shape.hidden if shape else config.get_text_config().hidden_size)
    waiting = start_engine_libraries(ds_config, hardware.device, ranks, console)
    hosts = start.hosts_of(options, ranks, console.warn)
    run = RunFolder(agree_on_run(options, ranks, console))
    kind = "QLoRA" if options.qlora else "LoRA"
    adapter = f", {kind} of rank {options.lora}" if options.lora else ""
    settings = data.info.settings | {"model": loading.architecture(config), "--no_packing": options.no_packing,
                                     "--optim": options.optim, **lora.settings(options),
                                     "weights of datasets": dataset_words.described(options.datasets),
                                     "--method": options.method, "--dpo_beta": options.dpo_beta}
    engine = "split layers" if options.split_layers is not None else deepspeed_config.engine_name(ds_config)
    layout = Layout(data.info.key, ranks.world_size, engine + adapter,
                    global_batch_size(options, ranks.world_size), settings, len(hosts.here) if hosts else 0)
    checkpoint = choose_checkpoint(options, run, ranks, layout, console)
    make_private(run.path)
    console.keep_log(run.path / "logs")
    shared_disk = is_shared(run.path, ranks)
    universal = False
    if checkpoint:
        options, universal = adapt_to_ranks(checkpoint, options, ds_config, ranks, console,
                                            writes(ranks, shared_disk), hosts)
        layout.batch = global_batch_size(options, ranks.world_size)
    own = tokenizer.load_tokenizer(options, data.folder / "tokenizer")
    tokenizer.check_rows(own, config, options, data.largest_token)
    return Setup(options, ranks, console, hardware.device, hardware.precision, hardware.peak, hardware.spare_devices,
                 hardware.memory, hardware.free, hardware.flash, ds_config, config, data, own, length, run, layout,
                 shared_disk, checkpoint, universal, hosts, shape, batch_reason), waiting


def settle_method(options: Options, data: TokenizedDataset) -> Options:
    """Return the options of a training on text, or on pairs of answers where the data hold such, with all defaults.

    Raises UserError for what isn't possible with them.
    """
    if data.info.form == PREFERENCES:
        options = pairs.settle(options, data.info.name)
    else:
        pairs.refuse_for_text(options, data.info.name)
        options = replace(options, method="sft")
    if options.early_stopping and not len(data.evaluation):
        raise UserError(f"--early_stopping: nothing is held out of {data.info.name}: --eval_dataset D or a larger "
                        "--eval_fraction", shared=True)
    return with_defaults(options)


def sequences_of(data: TokenizedDataset, options: Options, length: int) -> int | None:
    """Return about how many sequences an epoch has, None for a stream."""
    if options.streaming:
        return None
    if options.no_packing:
        return len(data.train if data.epoch is None else data.epoch)
    return -(-data.epoch_tokens() // length)


def agree_on_hardware(options: Options, ranks: Ranks, ds_config: dict[str, Any] | None
                      ) -> tuple[Options, Hardware]:
    """Meet the other ranks; settle device, precision and the open options with them."""
    silence_libraries()
    heartbeat.report("connecting to the other ranks")
    ranks.rendezvous()
    facts = ranks.all_gather_json("device", devices.device_facts(ranks.local_rank))
    device = devices.common_device(facts, ranks.hosts)
    if device != "cpu":
        torch.accelerator.set_device_index(ranks.local_rank)
    deepspeed_config.set_environment(device == "cpu", deepspeed_config.offloads_optimizer(ds_config),
                                     ranks.local_world_size)
    if ds_config is not None:
        options = deepspeed_config.adopt_values(options, ds_config, ranks.world_size)
    precision = devices.choose_precision(options.precision, facts)
    if device == "cuda" and precision != "fp32":  # float32 products that are left in a training in 16 bits
        torch.set_float32_matmul_precision("high")
    memory = min(entry["memory"] // (ranks.local_world_size if device == "cpu" else 1) for entry in facts)
    free = min(ranks.all_gather_json("free", devices.free_memory(device, memory)))
    return options, Hardware(device, precision, devices.peak_flops(facts, precision),
                             facts[ranks.rank]["count"] - ranks.local_world_size, memory, free,
                             all(entry["flash"] for entry in facts))


def make_data(options: Options, ranks: Ranks, console: Console, config: Any,
              length: int) -> TokenizedDataset:
    """Tokenize once a host; open the result on every rank; make sure that all hosts have the same."""
    if vocabulary := tokenizer.own_vocabulary(options, config):
        own = options.chat_template
        template = tokenizer.read_template(Path(own)) if own else tokenizer.TINY_TEMPLATE
        make: Callable[[Any], Any] = partial(tokenizer.own_tokenizer, template=template, vocabulary=vocabulary)
        name = f"own {vocabulary} {template}"
    else:
        loaded = tokenizer.load_tokenizer(options)
        name, make = tokenizer.tokenizer_id(loaded), lambda texts: loaded
    if ranks.is_first_here:
        made = dataset.prepare_dataset(options, name, make, length, partial(built_in_documents, ranks), console.say)
        ranks.set(f"data/{ranks.node}", made.info.key)
    data = dataset.load_prepared(options, ranks.get(f"data/{ranks.node}"))
    if dataset_words.described(options.datasets):
        shares = [part.share or 0.0 for part in options.datasets]
        data.epoch = mixture.epoch_pieces(data.train, data.info.sources, shares, options.seed)
    keys = ranks.all_gather_json("data-key", data.info.key, PREPARING_LIMIT_S)  # another host may be slower
    if len(set(keys)) > 1:
        odd = sorted({host for host, key in zip(ranks.hosts, keys, strict=True) if key != keys[0]})
        raise UserError(f"the data or tokenizer on {', '.join(odd)} differs from that on {ranks.hosts[0]}: "
                        "copy the same to every host", shared=True)
    return data


def built_in_documents(ranks: Ranks) -> list[str]:
    """Return Python's documentation as rank 0 has it: it differs between Python releases.

    Where a stranger could put another text into the store, each host has its own.
    """
    if ranks.is_first or not ranks.trust_the_store:
        texts = python_docs.python_documents()
        if not ranks.on_one_machine and ranks.is_first:
            ranks.set("built-in", texts)
        return texts
    found: list[str] = ranks.get("built-in")
    return found


def agree_on_run(options: Options, ranks: Ranks, console: Console) -> Path:
    """Return the run folder of all ranks: rank 0's, or, where a stranger could name one, each rank's own.

    Only the time in its name comes from rank 0 then, over the process group. Raises UserError where they differ.
    """
    if ranks.trust_the_store:
        return Path(ranks.all_gather_json("run", str(find_run(options)))[0])
    console.warn("the ranks meet at a port that asks nobody for a key (`invoke train` has one): let only these hosts "
                 "reach it, docs/security.md says how")
    day, second = ranks.all_reduce_sum(*(int(word) if ranks.is_first else 0
                                         for word in time.strftime("%Y%m%d %H%M%S").split()))
    own = find_run(options, f"{day:08.0f}-{second:06.0f}")
    digest = float(zlib.crc32(str(own).encode()))
    if ranks.all_reduce_sum(digest)[0] != digest * ranks.world_size:
        raise UserError(f"{ranks.host}: the ranks mean different run folders, here {own}: --output_dir DIR names one")
    return own


def start_engine_libraries(ds_config: dict[str, Any] | None, device: str, ranks: Ranks,
                           console: Console) -> CommunicationTimer:
    """Start the process group, and keep DeepSpeed from compiling what this run doesn't need."""
    if ds_config is not None:
        operators = deepspeed_config.complete_config(ds_config, device == "cpu")
        for warning in compilation.check_compilation(operators) if ranks.is_first_here else ():
            console.warn(warning)
        if device == "cpu":
            deepspeed_config.skip_shared_memory_operator()
    heartbeat.report("the all-reduce test")
    ranks.start_process_group(device)
    waiting = CommunicationTimer(device)
    if ds_config is not None:  # without DeepSpeed gradients go by another way
        waiting.install()
        deepspeed_config.adopt_process_group()
    return waiting


def is_shared(path: Path, ranks: Ranks) -> bool:
    """Return whether all hosts see the same run folder: rank 0 leaves a file there, the others look for it."""
    mark = path / ".shared"
    if ranks.is_first:
        mark.touch()
    ranks.barrier()
    seen = ranks.all_reduce_sum(mark.exists())[0] == ranks.world_size
    if ranks.is_first:
        mark.unlink()
    return seen
