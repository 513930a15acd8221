"""What people type by mistake, coming from nowhere, TRL, axolotl or verl: one line names the mend.

All commands run in one process in which torch and transformers cannot be imported, so that each
message is there within a second. `MISTAKES` is the table: what is typed, or the lines of a config,
and what the last line on stderr must say.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MISTAKES = {
    # Commands.
    "trian good.yaml": "did you mean 'train'?",
    "run good.yaml": "did you mean `opsd train good.yaml`?",
    "good.yaml": "did you mean `opsd train good.yaml`?",
    "--resume good.yaml": "did you mean `opsd train good.yaml --resume`?",
    "evaluate model --benchmark gsm8k": "did you mean `opsd eval model --benchmark gsm8k`?",
    "grpo good.yaml": "did you mean `opsd train good.yaml method=grpo`?",
    "finetune good.yaml": "did you mean `opsd train good.yaml`?",
    "help": "did you mean `opsd --help`?",
    "benchmark": "did you mean 'bench'?",
    "infer model": "did you mean `opsd chat model`?",
    # The config's place.
    "train --config good.yaml": "as in `opsd train good.yaml`",
    "train good": "did you mean 'good.yaml'?",
    "train good.yml": "did you mean 'good.yaml'?",
    "train goood.yaml": "did you mean 'good.yaml'?",
    "train rows.jsonl": "a config names the data as data.source (`opsd init` writes one)",
    "train model": "name it in a config as model.path",
    "train run": "a run goes on with `opsd train run --resume`",
    "train study.yaml": "`opsd compare study.yaml` runs it",
    "train": "it needs a CONFIG.yaml; `opsd init` writes one",
    "train good.yaml other.yaml": "one config at a time (`opsd compare` takes several)",
    "compare goood.yaml": "did you mean 'good.yaml'?",
    # Fields as options, as TRL and others have them.
    "train good.yaml --learning_rate 1e-5": "set as in train.learning_rate=1e-5",
    "train good.yaml --lr=1e-5": "set as in train.learning_rate=1e-5",
    "train good.yaml --num_generations 4": "set as in rollout.group_size=4",
    "train good.yaml --train.steps 5": "set as in train.steps=5",
    "train good.yaml --use_vllm true": "set as in rollout.engine=vllm",
    "train good.yaml --output_dir runs/x": "set as in output.dir=runs/x",
    "train good.yaml --output runs/x": "set output.dir=runs/x",
    "train good.yaml --seed 3": "set as in train.seed=3",
    "train good.yaml --gpus 2": "torchrun --nproc-per-node 2 -m opsd train",
    "train good.yaml --dry_run": "did you mean `--dry-run`?",
    "train good.yaml --resume_from_checkpoint x": "`--resume` goes on",
    "train good.yaml --dataset_name rows.jsonl": "set as in data.source=rows.jsonl",
    "train good.yaml --epochs 3": "an epoch has rows ÷ train.problems_per_step",
    "train good.yaml --gradient_checkpointing": "set as in train.gradient_checkpointing=true",
    "train good.yaml --overwrite_output_dir": "choose another output.dir, or go on by --resume",
    "train good.yaml --load_in_4bit": "set as in model.lora.quantize=nf4",
    "train good.yaml --per_device_train_batch_size 4": "train.problems_per_step (of the whole",
    "train good.yaml --nproc 2": "torchrun --nproc-per-node 2 -m opsd train",
    "train good.yaml --check": "did you mean `--dry-run`?",
    "train good.yaml --resume run": "`opsd train run --resume`",
    "train good.yaml --resume run/checkpoint-5": "write `opsd train run --resume`",
    "train good.yaml --resume out/checkpoint-5": "output.dir's last checkpoint",
    # Overrides.
    "train good.yaml train.steps 5": "did you mean train.steps=5?",
    "train good.yaml steps=5": "here it is train.steps",
    "train good.yaml train.step=5": "did you mean 'steps'?",
    "train good.yaml trainer.steps=5": "here it is train.steps=5",
    "train good.yaml models.path=x": "did you mean 'model'?",
    "train good.yaml train.learning-rate=1e-5": "here it is train.learning_rate=1e-05",
    "train good.yaml train.temperature=1": "rollout.temperature=1 or loss.temperature=1",
    "train good.yaml model=Qwen/Qwen3-1.7B": "as in model.path=Qwen/Qwen3-1.7B",
    "train good.yaml data=rows.jsonl": "as in data.source=rows.jsonl",
    "train good.yaml loss.reward=mine.py:f": "as in loss.reward.verifier=mine.py:f",
    "train good.yaml model.lora=true": "model.lora={} has it",
    "train good.yaml actor_rollout_ref.rollout.n=4": "here it is rollout.group_size",
    "train good.yaml actor_rollout_ref.actor.optim.lr=1e-6": "it is train.learning_rate=1e-06",
    "train good.yaml data.train_files=rows.jsonl": "here it is data.source",
    "train good.yaml base_model=x": "here it is model.path",
    "train good.yaml trainer.n_gpus_per_node=2": "torchrun --nproc-per-node 2 -m opsd train",
    "train good.yaml algorithm.adv_estimator=grpo": "here it is method",
    "train good.yaml trainer.total_epochs=3": "here it is train.steps (in steps",
    "train good.yaml trainer.project_name=x": "here it is output.project",
    "train good.yaml rollout.n=4": "here it is rollout.group_size",
    "train good.yaml model.quantize=nf4": "here it is model.lora.quantize",
    "train good.yaml model.dtype=bf16": "here it is train.precision",
    "train good.yaml model.lora.r=16": "here it is model.lora.rank",
    "train good.yaml train.warmup_ratio=0.1": "here it is train.warmup_steps (in steps)",
    "train good.yaml train.learning_rate = 1e-5": "without spaces: train.learning_rate=1e-5",
    "train good.yaml trainer.save_freq=10": "here it is train.save_every",
    "train good.yaml actor_rollout_ref.rollout.name=vllm": "here it is rollout.engine",
    "train good.yaml model.lora={rank:16}": "a space after the colon: `rank: 16`",
    "train good.yaml data.columns={problem:question}": "a space after the colon: `problem: ",
    "train good.yaml model.name=x": "here it is model.path",
    "train good.yaml prompts.system= train.steps=ten": "valid integer",
    "train good.yaml --max_prompt_length 512": "set as in prompts.too_long (since",
    "train good.yaml --distributed": "torchrun --nproc-per-node N -m opsd train",
    "train good.yaml train.steps= 5": "without spaces: train.steps=5",
    "train good.yaml tokenizer.path=x": "it comes with model.path",
    # Values.
    "train good.yaml method=gkd": "did you mean 'distill'?",
    "train good.yaml method=sdft": "`opsd init sdft`",
    "train good.yaml method=dpo": "DPO learns from pairs",
    "train good.yaml method=OPSD": "did you mean 'opsd'?",
    "train good.yaml method=ppo": "did you mean 'grpo'?",
    "train good.yaml loss.divergence=reverse-kl": "did you mean 'reverse_kl'?",
    "train good.yaml loss.divergence=kl": "did you mean 'forward_kl'",
    "train good.yaml train.precision=bfloat16": "did you mean 'bf16'?",
    "train good.yaml rollout.engine=vLLM": "did you mean 'vllm'?",
    "train good.yaml rollout.engine=hf": "did you mean 'generate'?",
    "train good.yaml train.sharding=fsdp": "did you mean 'fsdp2'?",
    "train good.yaml model.attention=flash_attn": "did you mean 'flash_attention_2'?",
    "train good.yaml teacher.policy=frozen": "did you mean 'initial'?",
    "train good.yaml output.report_to=tensorbord": "did you mean 'tensorboard'?",
    "train good.yaml output.report_to=[wandb,tb]": "did you mean 'tensorboard'?",
    "train good.yaml train.micro_batch_tokens=8k": "write 8000, without a unit",
    "train good.yaml loss.memory_budget=1GB": "write 1000000000, without a unit",
    "train good.yaml rollout.gpu_memory=24GB": "a share of the GPU's memory, such as 0.4",
    "train good.yaml eval.problems=-5": "greater than or equal to 0",
    "train good.yaml rollout.top_p=90%": "a share is written as 0.9",
    "train good.yaml train.learning_rate=-1e-5": "greater than 0",
    "train good.yaml rollout.temperature=0": "greater than 0",
    "train good.yaml train.steps=ten": "valid integer",
    "train good.yaml rollout.max_new_tokens=1,024": "write 1024",
    "train good.yaml train.learning_rate=1e-5,": "write 1e-5",
    "train good.yaml train.max_grad_norm=none": "write 0, which is off",
    "train good.yaml train.gradient_checkpointing=yes": "write true",
    "train good.yaml rollout.temperature=0,7": "write 0.7",
    "train good.yaml eval.every=epoch": "write a number of steps",
    "train good.yaml loss.clip=0.3": "did you mean loss.clip=token, with the number as",
    "train good.yaml method=opd": "did you mean 'opsd' (the model teaches itself)",
    "train good.yaml method=rlhf": "did you mean 'grpo'?",
    "train good.yaml output.keep=all": "did you mean 'both'?",
    "train good.yaml method=grpo rollout.group_size=4 loss.beta=0.04": "loss.kl",
    "train good.yaml data.columns=question": "write data.columns={problem: question}",
    # Files, models and columns.
    "train good.yaml data.source=rwos.jsonl": "did you mean 'rows.jsonl'?",
    "train good.yaml eval.source=rwos.jsonl": "did you mean 'rows.jsonl'?",
    "train good.yaml data.source=gsm.jsonl": "problem=question data.columns.solution=answer)",
    "train good.yaml data.columns.problem=problm": "did you mean 'problem'?",
    "train good.yaml data.columns.question=problem": "did you mean data.columns.problem=question?",
    "train good.yaml data.columns.solution=rationale": "data.columns.solution=solution",
    "train good.yaml data.source=rows": "did you mean 'rows.jsonl'?",
    "train good.yaml data.source=alpaca.jsonl": "rows without answers: eval.problems=0",
    "train good.yaml data.source=nested.jsonl": "data.columns.answer=extra.ground_truth",
    "train good.yaml data.source=https://huggingface.co/datasets/a/b": "did you mean 'a/b'?",
    "train good.yaml model.path=https://huggingface.co/a/b": "did you mean 'a/b'?",
    "train good.yaml model.path=model/config.json": "did you mean 'model'?",
    "train good.yaml model.path=./modle": "did you mean 'model'?",
    "train good.yaml model.path=run": "did you mean 'run/model'?",
    "train good.yaml method=grpo rollout.group_size=2 loss.reward.verifier=no.py:f": "'no.py'",
    # Other commands.
    "eval model": "--benchmark is missing",
    "eval model --benchmark gms8k": "did you mean 'gsm8k'?",
    "eval model --benchmark gsm.jsonl": "--columns problem=question",
    "eval ./modle --benchmark rows.jsonl": "did you mean 'model'?",
    "eval model --benchmark rows.jsonl --max_new_tokens 9": "did you mean `--max-new-tokens`?",
    "eval model --tasks gsm8k": "did you mean `--benchmark`?",
    "plan Qwen/Qwen3-8B --gpu rtx4900": "did you mean '4090'?",
    "plan Qwen/Qwen3-8B --gpu 'RTX 2080 Ti'": "another is named by its memory: --gpu 12G",
    "plan Qwen/Qwen3-8B --gpu 2080": "another is named by its memory: --gpu 12G",
    "serve-teacher model --dtype bfloat16": "did you mean 'bf16'?",
    "serve-teacher model --dtype float32": "did you mean 'fp32'?",
    "plan Qwen/Qwen3-8B --gpu cuda:0": "or a size such as 24GB",
    "plan Qwen/Qwen3-8B --memory 24gigs": "a size such as 24GB",
    "train good.yaml --dry-run --for h20x2": "did you mean 'h200'?",
    "quickstart tiny": "did you mean `--tiny`?",
    "quickstart --methods dpo": "opsd,grpo,sft,distill",
    "report rnu": "did you mean 'run'?",
    "init qwen3": "did you mean 'qwen3-",
    "chat ./modle": "did you mean 'model'?",
    "chat model --base": "--base needs a name",
    "plan Qwen/Qwen3-8B --vram 24": "did you mean `--memory`?",
    "eval model --dataset rows.jsonl": "did you mean `--benchmark`?",
    "chat model --prompt hello": "`echo QUESTION | opsd chat MODEL`",
    "eval model --benchmark gsm8k --num-fewshot 5": "models are asked without examples",
    "plan Qwen/Qwen3-8B --gpu RTX 4090": "--gpu rtx-4090",
    "plan Qwen/Qwen3-8B --gpus h200": "`--gpu` names the GPU",
    "export run --merge": "'run/model' has no adapters to merge: it is the whole model",
    "export rnu --merge": "did you mean 'run'?",
    "merge run": "did you mean `opsd export run --merge`?",
    "export run --format gguf": "did you mean `--gguf`?",
    "export run --gguf --type q4_k_m": "`llama-quantize model.gguf small.gguf q4_k_m`",
    "dryrun good.yaml": "did you mean `opsd train good.yaml --dry-run`?",
    "quickstart --fast": "did you mean `--tiny`?",
    "quickstart --tiny --epochs 1": "train.steps (in steps",
    "init --template grpo": "`opsd init NAME`",
    "init my-config": "`opsd init --output my-config.yaml`",
    # The value travels with the name, where the field takes it.
    "train good.yaml actor_rollout_ref.rollout.n=8": "here it is rollout.group_size=8",
    "train good.yaml 'data.train_files=[a.parquet,b.parquet]'": 'data.source=["a.parquet", "b.pa',
    "train good.yaml data.filter_overlong_prompts=True": "here it is prompts.too_long=skip",
    "train good.yaml model.torch_dtype=bfloat16": "here it is train.precision=bf16",
    "train good.yaml --deepspeed zero2": "set as in train.sharding=zero2",
    "train good.yaml --deepspeed ds.json": "train.sharding (none, fsdp2, zero1, zero2, zero3)",
    "train good.yaml --attn_impl flash_attn": "set as in model.attention=flash_attention_2",
    "train good.yaml --vllm_mode colocate": "set as in rollout.engine=vllm",
    "train good.yaml --loss_type dr_grpo": "loss.aggregation=constant loss.scale_advantages=false",
    "train good.yaml --kl_clip 0.05": "set as in loss.clip_threshold=0.05 loss.clip=entry",
    "train good.yaml --distillation_alpha 0.5": "1: reverse_kl, between: jsd with loss.beta",
    "train good.yaml --eval_strategy steps --eval_steps 50": "eval.every (in steps); eval.every=50",
    "train good.yaml --tuner_type lora --lora_rank 8": "model.lora={}; model.lora.rank=8",
    "train --model model --dataset rows.jsonl": "it needs a CONFIG.yaml; `opsd init` writes one",
    "train good.yaml --distillation_topk 100": "the loss reads the whole vocabulary",
    "train good.yaml trainer.logger=['console','wandb']": "here it is output.report_to",
    "train good.yaml data.val_set_size=0.1": "here it is eval.problems (their number)",
    "train good.yaml model.max_seq_length=2048": "here it is rollout.max_new_tokens (since",
    "train good.yaml actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2": "in tokens",
    "train good.yaml +model.trust_remote_code=True": "write model.trust_remote_code=True",
    "train good.yaml train.schedule=cosine_with_restarts": "did you mean 'cosine'?",
    "train good.yaml train.gradient_checkpointing=unsloth": "write true",
    "train good.yaml loss.aggregation=dapo": "did you mean 'token'?",
    "train good.yaml data.source=rows.jsonl#500": "data.source=rows.jsonl data.limit=500",
    "train good.yaml model.path=qwen3:0.6b": "did you mean 'Qwen/Qwen3-0.6B'?",
    "train good.yaml model.use_shm=True": "unknown key 'model.use_shm': leave it out",
    "eval model --apply_chat_template": "the model's own chat template is used",
    # Commands of ms-swift, axolotl and TRL.
    "rlhf --rlhf_type gkd": "did you mean `opsd train --rlhf_type gkd`?",
    "preprocess good.yaml": "did you mean `opsd train good.yaml --dry-run`?",
    "merge_lora run": "did you mean `opsd export run --merge`?",
    "vllm-serve --model model": "did you mean `opsd serve-teacher --model model`?",
    # A directory above the run, a file in it, the wrong kind of file.
    "chat tiny": "no model yet; did you mean 'tiny/opsd/model'?",
    "eval quick": "a quickstart, with a run for each method; did you mean 'quick/grpo'?",
    "chat runs": "did you mean 'runs/b/model'?",
    "report run/config.yaml": "did you mean 'run'?",
    "replay run": "did you mean 'run/failed-step-7.pt'?",
    "replay tiny": "without failed-step-N.pt (a step that fails leaves one",
    "help train": "did you mean `opsd train --help`?",
    "plan": "required: MODEL_OR_CONFIG, as in",
    "plan Qwen/Qwen3-8B --gpu": "--gpu needs a value: b200, h200",
    "eval model --benchmark": "--benchmark needs a value: aime24",
    "report runs/none": "'runs' has ",
    "plan Qwen/Qwen3-8B --gpu rtx6000": "or a size such as 24GB",
    "plan Qwen/Qwen3-8B --gpu 8xh1000": "--gpu is 'h1000'",
    # The fourth list, typed blind.
    "train good.yaml --lora_target_modules q_proj v_proj": "model.lora.targets=[q_proj,v_proj]",
    "train --lr 1e-5 good.yaml": "set as in train.learning_rate=1e-5",
    "train good.yaml --teacher_update_rate 0.05": "set as in teacher.ema_decay=0.95",
    "train good.yaml --nodes 2 --ntasks-per-node 8": "--nnodes 2 --nproc-per-node N",
    "train good.yaml --gres=gpu:4": "torchrun --nproc-per-node 4 -m opsd train",
    "train good.yaml --partition gpu": "an option of `sbatch`",
    "train good.yaml --set train.steps=5": "stands without an option, as in train.steps=5",
    "train good.yaml eval.every=10%": "it is a count, not a share",
    "eval --model run --benchmark gsm8k": "`opsd eval run --benchmark gsm8k`",
    "eval --model=run": "as in `opsd eval MODEL`",
    "eval model gsm8k": "did you mean `--benchmark gsm8k`?",
    "eval model --benchmark gsm8k --pass@k 8": "did you mean `--samples`?",
    "eval model --benchmark rows.jsonl --temperature greedy": "write 0",
    "eval model --benchmark rows.jsonl --samples 1k": "write 1000, without a unit",
    "eval model --frobnicate 3": "`opsd eval --help` lists options",
    "compare run,tiny": "write `run tiny`",
    "plan Qwen/Qwen3-8B --num_gpus 4": "did you mean `--gpus`?",
    "chat model 'What is 2+2?'": "`echo 'What is 2+2?' | opsd chat model`",
    "export run --gguf q8_0": "did you mean `--type q8_0`?",
    "export --run run --merge": "`opsd export run --merge`",
    "serve model": "did you mean `opsd serve-teacher model`?",
    "serve-teacher model 8000": "did you mean `--port 8000`?",
    "replay run/failed-step-8.pt": "did you mean 'run/failed-step-7.pt'?",
    "report run/model": "did you mean 'run'?",
    "report --run run": "`opsd report run`",
    "train good.yaml --resume --checkpoint run/checkpoint-10": "`--resume` goes on from the last",
    "train other/good.yaml data.source=other/train.csv": "did you mean 'other/rows.jsonl'?",
    "train good.yaml eval.every=yes": "write a number",
    # The sixth list, typed blind.
    "resume run": "did you mean `opsd train run --resume`?",
    "config good.yaml": "`opsd train CONFIG.yaml --dry-run` checks it",
    "train configs/good.yaml": "did you mean 'good.yaml'?",
    "train good.yaml -o runs/x": "set output.dir=runs/x",
    "train good.yaml train.eval_every=10": "here it is eval.every=10",
    "train good.yaml trainer.dynamic_sampling=2": "here it is rollout.dynamic_sampling=2",
    "train good.yaml eval.problems=0.2": "it is a count, not a share",
    "train good.yaml data.source=data/rows.jsonl": "did you mean 'rows.jsonl'?",
    "train good.yaml data.columns.prompt=question": "did you mean data.columns.problem=question?",
    "train good.yaml teacher=Qwen/Qwen3-8B": "teacher.path=Qwen/Qwen3-8B teacher.policy=model",
    "train good.yaml model.lora=nf4": "as in model.lora.quantize=nf4",
    "train good.yaml eval=50": "as in eval.problems=50",
    "chat run/checkpoint-10": "did you mean 'run/model'?",
    # The seventh.
    "continue run": "did you mean `opsd train run --resume`?",
    "clean": "there is no command 'clean'; there are",
    "train-opsd good.yaml": "did you mean 'train'?",
    "train good.yaml --no-eval": "eval.problems=0 turns it off",
    "train good.yaml --no-gradient-checkpointing": "train.gradient_checkpointing=false",
    "eval model --benchmark gsm8k --fewshot 5": "models are asked without examples",
    "plan model --gpus 4090": "did you mean --gpu 4090?",
    "plan godo.yaml": "did you mean 'good.yaml'",
    "plan ./modle": "did you mean 'model'",
    "plan rows.jsonl": "a file; it must be a directory, or a hub name",
    "init good.yaml": "no such example; `opsd init --output good.yaml` names the file",
    "train good.yaml data.val_split=0.1": "eval.problems is how many are held out",
    "train good.yaml data.num_samples=500": "here it is data.limit=500",
    "train good.yaml teacher.ema=0.99": "here it is teacher.ema_decay=0.99",
    # The eighth: the configs of NeMo-RL and prime-rl, key by key.
    "train good.yaml distillation.num_prompts_per_step=128": "train.problems_per_step=128",
    "train good.yaml distillation.max_num_steps=1000": "here it is train.steps=1000",
    "train good.yaml distillation.val_period=20": "here it is eval.every=20",
    "train good.yaml policy.train_micro_batch_size=1": "train.micro_batch_tokens (in tokens)",
    "train good.yaml policy.max_total_sequence_length=8192": "here it is rollout.max_new_tokens",
    "train good.yaml policy.optimizer.name=torch.optim.AdamW": "optimizer=adamw_torch_fused",
    "train good.yaml teacher.model_name=Qwen/Qwen3-4B": "teacher.path=Qwen/Qwen3-4B teacher.pol",
    "train good.yaml data.validation.dataset_name=AIME2024": "here it is eval.source=AIME2024",
    "train good.yaml logger.wandb_enabled=true": "here it is output.report_to=wandb",
    "train good.yaml seq_len=2048": "here it is rollout.max_new_tokens",
    "train good.yaml optimizer.name=adamw": "here it is train.optimizer=adamw_torch_fused",
    # The ninth: rllm, SkyRL, oumi.
    "train good.yaml trainer.placement.policy_num_gpus_per_node=8": "--nproc-per-node 8",
    "train good.yaml trainer.frobs=3": "unknown key 'trainer' at the top; known: method",
    "train good.yaml algorithm.teacher_rollout_args.model=Qwen/Q": "teacher.path=Qwen/Q",
    "train good.yaml data.val_temperature=0.0": "`opsd eval` measures at another temperature",
    "train good.yaml training.trainer_type=TRL_GRPO": "here it is method=grpo",
    "train good.yaml model.torch_dtype_str=bfloat16": "here it is train.precision=bf16",
    "doctor --verbose": "`opsd doctor` takes no options",
    # The tenth to the twelfth: a first day.
    "quickstart --tiny --max-steps 20": "did you mean `--steps`?",
    "quickstart --tiny --output_dir runs/x": "did you mean `--output`?",
    "quickstart --tiny --methods opsd grpo": "a list has commas, as in --methods opsd,grpo",
    "quickstart --methods all": "it must be opsd,grpo,sft,distill, or some of these",
    "quickstart --seed 0,1,2": "one value at a time: `opsd compare` runs several",
    "compare good.yaml --seeds 0 1 2": "a list has commas, as in --seeds 0,1,2",
    "train good.yaml CUDA_VISIBLE_DEVICES=0": "`CUDA_VISIBLE_DEVICES=0 opsd train good.yaml`",
    "train good.yaml train.learning_rate:1e-5": "did you mean train.learning_rate=1e-5?",
    "train good.yaml train.steps: 5": "did you mean train.steps=5?",
    "train good.yaml --overwrite": "choose another output.dir, or go on by --resume",
    "--bogus train good.yaml": "unrecognized arguments: --bogus",
    "eval run --benchmark gsm8k --max-samples 100": "did you mean `--problems`?",
    "eval run --benchmark gsm8k --greedy": "write --temperature 0",
    "eval run --benchmark gsm8k,math-500": "is not known; one at a time",
    "chat run --system-prompt brief": "a run's prompts.system is used",
    "chat run --compare": "did you mean `--base`?",
    "plan good.yaml --gpu a100 80gb": "it has no space: --gpu a100-80gb",
    "plan good.yaml --gpu 24 GB": "it has no space: --gpu 24gb",
    "export run --to gguf": "did you mean `--gguf`?",
    "push run me/mine": "output.push_to_hub=OWNER/NAME uploads model/",
    "init grpo my.yaml": "did you mean `--output my.yaml`?",
    "report run --port 6006": "open RUN_DIR/report.html",
    "train good.yaml data.test=gsm.jsonl": "here it is eval.source=gsm.jsonl",
    "train good.yaml data.source=rows.xlsx": "save it as .csv",
    "train good.yaml train.steps='10 steps'": "write 10, without a unit",
    "train good.yaml rollout.max_new_tokens='2k tokens'": "write 2000, without a unit",
    "train good.yaml train.seed=[0,1]": "one value at a time: `opsd compare` runs several",
    "train good.yaml method=opsd,grpo": "one value at a time: `opsd compare` runs several",
    "train good.yaml train.learning_rate=1e-5,2e-5": "one value at a time: `opsd compare`",
    "train good.yaml eval=false": "write eval.problems=0",
    "train good.yaml eval.every=never": "write 0",
    "train good.yaml prompts.teacher=prompts/teacher.txt": "it is the template itself",
    "train good.yaml teacher.policy=Qwen/Q": "teacher.path=Qwen/Q teacher.policy=model?",
    "train good.yaml rollout.engine=http://a:1": "did you mean rollout.server=http://a:1?",
    "train good.yaml loss.kl=forward": "did you mean loss.divergence=forward_kl?",
    "train good.yaml teacher.policy=int8": "did you mean teacher.quantize=int8?",
    "train good.yaml data=[rows.jsonl,gsm.jsonl]": 'data.source=["rows.jsonl", "gsm.jsonl"]',
    "train good.yaml loss.alpha=0.5": "here it is loss.beta=0.5",
    "train good.yaml rollout.tensor_parallel=2": "it is a flag of `vllm serve`",
    "train good.yaml prompts.user=hello": "here it is prompts.student=hello",
    "train good.yaml wandb.entity=me": "WANDB_ENTITY",
    "train good.yaml optimizer.type=adamw": "train.optimizer=adamw_torch_fused",
    "train good.yaml sampling.num_samples=8": "here it is rollout.group_size=8",
    "train good.yaml dataset.question_field=q": "here it is data.columns.problem=q",
    "train good.yaml --name first": "set output.run_name=first",
    "train good.yaml eval.interval=10": "here it is eval.every=10",
    "train good.yaml loss.jsd.beta=0.5": "here it is loss.beta=0.5",
    "train good.yaml prompts.student_template=hello": "here it is prompts.student=hello",
    "train good.yaml vllm.enabled=true": "here it is rollout.engine=vllm",
    "train good.yaml train.optimizer.learning_rate=1": "here it is train.learning_rate=1",
    "train good.yaml eval.n_samples=4": "with several samples",
    "train good.yaml checkpoint.keep=3": "a number of checkpoints is train.save_total_limit",
    # What the shell, a page or a chat makes of what was meant; OpenRLHF's and lm-eval's options.
    "train good.yaml model.lora={rank: 16, alpha: 32}": "what holds blanks: 'model.lora={rank",
    "train good.yaml prompts.system=Be kind train.steps=5": "blanks: 'prompts.system=Be kind'",
    "train good.yaml train.steps=": "train.steps is None: input should be a valid integer; give it",
    "train good.yaml \u2014dry-run": "of a typeset page: write --dry-run",
    "train good.yaml train.steps=\u201c5\u201d": "of a typeset page: write train.steps=5",
    "train 'good.yaml train.steps=5'": "quotes, which make it one name: `opsd train good.yaml",
    "train good.yaml --pretrain Qwen/Q": "set as in model.path=Qwen/Q",
    "train good.yaml --adam_betas 0.9 0.95": "set as in train.beta1 (and train.beta2)",
    "train good.yaml --no_advantage_std_norm": "set as in loss.scale_advantages=false",
    "train good.yaml --colocate_all_models": "rollout.engine=vllm shares the GPUs with training",
    "eval --model hf --model_args pretrained=run --tasks gsm8k": "`opsd eval run`; did you mean",
    "eval --model run --model_name x": "`opsd eval run --model_name x`",
    "plan llama3": "did you mean 'Llama-3.2-3B'?",
    "plan model/other.json": "there is no such file; did you mean 'model/config.json'?",
    "--debug": "it needs a command; `opsd --help` lists them",
    "train good.yaml --generation_kwargs.temperature 0.7": "set as in rollout.temperature=0.7",
    "train good.yaml data.source=rows.txt": "; one JSON object a line is rows.jsonl",
    "train good.yaml data.source=final.jsonl": "did you mean 'final'? data.columns.answer=final",
    "export run --gguf --type int8": "did you mean 'q8_0'?",
    "train good.yaml algorithm.kl_ctrl.kl_coef=0.001": "here it is loss.kl=0.001",
    "train good.yaml 'prompts.student={{ question }}'": "solution; did you mean 'problem'?",
    "train good.yaml data.source=cot.jsonl": "did you mean 'cot'? data.columns.solution=cot",
    "train good.yaml data.source=ROWS.JSONL": "did you mean 'rows.jsonl'?",
    "plan Qwen/Qwen3-8B --gpu v1000:4": "--gpu is 'v1000'",
    "train good.yaml rollout.topk=20": "here it is rollout.top_k=20",
    "train good.yaml data.source=comment.jsonl": "column 1): JSON has no comments; expected",
    "train good.yaml data.source=headless.csv": "line names its columns, as in problem,solution,",
    "train good.yaml model.path=q.gguf": "write model.path=. model.gguf_file=q.gguf",
    "train good.yaml loss.divergence=jsd loss.beta=1.0": "that is loss.divergence=reverse_kl",
    "train Qwen/Qwen3-1.7B rows.jsonl": "data.source=rows.jsonl in a config names it",
    "plan Qwen/Qwen3-8B --memory 24 GB": "it has no space: --memory 24gb",
    "plan Qwen/Qwen3-8B --gpu h100 x4": "it has no space: --gpu h100x4",
    "train good.yaml train.steps=None": "give it a value, or leave it out",
    "train good.yaml rollout.engine=vllm_server": "needs it: rollout.server=http://localhost:8000",
    "eval model --benchmark gsm8k --engine vllm_server": "as in --server http://localhost:8000",
    "train good.yaml --resume=auto": "--resume takes no value: write it alone",
    "train good.yaml model.path=$HOME2/model": "a config fills in no variables",
    "train good.yaml data.source=target.jsonl": "has no column 'problem' nor 'solution' (did you",
    "train good.yaml data.source=weights": "a model; model.path is to name it",
    "train good.yaml method=distill teacher.policy=model teacher.path=box:8001": "'http://box:8001'",
    "eval run tiny/opsd --benchmark gsm8k": "one model at a time; `opsd compare` takes",
    "train good.yaml train.optimizer=adam": "did you mean 'adamw_torch_fused'?",
    "train good.yaml rollout.top_p=95": "a share is written as 0.95",
    "train good.yaml method=sft teacher.policy=ema": "sft runs no teacher here",
    "plan mistral-7b": "`hf download mistralai/Mistral-7B-Instruct-v0.3 config.json` fetches it",
    "chat gemma-3": "did you mean 'google/gemma-3-1b-it'?",
    "train good.yaml train:steps=5": "here it is train.steps=5",
    "train good.yaml train/steps=5": "here it is train.steps=5",
    "train good.yaml --dry-run --gpu 4090": "`--dry-run --for NAME` plans for another",
    "train good.json": "if this is one, name it good.yaml",
    "plan Qwen/Qwen3-8B --gpu h100 --seq-len 4096": "set rollout.max_new_tokens=4096",
    "compare run tiny/opds": "give the directory of a run; did you mean 'tiny/opsd'?",
    "train good.yaml data.source=comma.json": ": a comma stands before a closing bracket",
    "train good.yaml data.source=python.json": ": it has Python's quotes, and json.dumps(row)",
    "train good.yaml data.source=latex.jsonl": ": a backslash in a text is written twice",
    "serve-teacher model --api_key abc": "OPSD_TEACHER_KEY in the environment is the key",
    # What the machine, a model's files or a run's directory rule out.
    "train good.yaml model.path=damaged": "config.json' is not JSON",
    "plan damaged": "config.json' is not JSON",
    "plan small": "the model's window is 256; --solution-tokens 64 --prompt-tokens 64",
    "train good.yaml model.attention=flash_attention_2": "'sdpa' runs everywhere",
    "train good.yaml model.lora.quantize=nf4": "train with 'none'",
    "train stopped --resume": "of its 1 steps there is no checkpoint to go on from; `opsd train",
}

CONFIGS = {
    "model: {path: model}\nrollout: {top_p: 0,95}\n": "a number has a point, not a comma: 0.95",
    "model:\n  - path: model\ndata: {source: x}\n": "without `- `, as in model.path=",
    "model: {path: model}\ntrain\n  steps: 5\n": "ends with a colon, as in `train:`",
    "trainer:\n  total_epochs: 3\n  nnodes: 2\nmodel: {path: m}\n": "--nnodes 2",
    "train:\n\tsteps: 5\n": "indented by spaces, not by tabs",
    'data: {source: "C:\\Users\\me\\rows.jsonl"}\n': "stands in single quotes",
    "train: {steps: 5}\nmodel: {path: model}\n": "data is missing: say data.source=rows.jsonl",
    "lr: 1e-5\nmodel: {path: model}\n": "here it is train.learning_rate",
    "model: model\n": "in a file `model: {path: model}`",
    "model.path: model\n": "in a file it is `model: {path: model}`",
    "model: {path: model}\nmodel.lora.rank: 8\n": "in a file it is `model: {lora: {rank: 8}}`",
    "model_name_or_path: model\ndataset_name: rows.jsonl\n": "here it is data.source",
    "base_model: model\nadapter: lora\n": "model.lora={}",
    "base_model: model\ndata: {source: x}\n": "opsd: unknown key 'base_model'",
    "train:\n  steps:50\n  seed: 1\n": "a space after the colon: `steps: 50`",
    "model:\n  path: model\n data:\n  source: x\n": "the lines of a section are indented alike",
    "model: {path: model}\ndata:\n  source:x\n": "a space after the colon: `source: x`",
    "train:\n  - steps: 5\n  seed: 1\n": "write `steps: 5` without `- `",
    "model:\n  path: 'model\ndata:\n": "a quote is not closed",
    "prompts:\n  student: {{ problem }}\n": "is quoted: '{{ problem }}'",
    "prompts:\n  student: Solve: {{ problem }}\n": "a text that holds `: ` is quoted",
    "stage: sft\nfinetuning_type: lora\ntemplate: qwen\n": "the model's own chat template is used",
    "train: {steps: 5\nmodel: {path: model}\n": "a brace is not closed",
    "train: {gradient_checkpointing: 'true'}\nmodel: {path: m}\n": "write true",
    "train: {optimizer: {name: adamw, lr: 1e-5}}\n": "here it is train.learning_rate=1e-05",
    "generation: {temperature: 0.7}\n": "here it is rollout.temperature=0.7",
    "prompts:\n  teacher: |\n  {{ problem }}\n  {{ solution }}\n": "the text below `teacher:`",
    "model: {path: model}\ndata:\n  - source: rows.jsonl\n": "`- `, as in data.source=rows.jsonl",
    "model: {path: model}\ndata: source: rows.jsonl\n": "write `data:`, and below it, indented, `",
    "model:\n  _component_: torchtune.models.x\n": "model.path says what the model is",
}

TYPES = """
import contextlib, io, json, shlex, sys, time
sys.modules["torch"] = sys.modules["transformers"] = None
from opsd.cli import first_look
from opsd.cli.main import main
first_look.may_have_gpu = lambda: False
told = {}
for typed in json.load(sys.stdin):
    error, begun = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(shlex.split(typed))
        except SystemExit as end:
            code = end.code
    told[typed] = code, error.getvalue(), time.process_time() - begun
json.dump(told, sys.stdout)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with rows, configs, a model and a run."""
    place = tmp_path_factory.mktemp("mistakes")
    row = {"problem": "1+1", "solution": "1 and 1 are 2.", "answer": "2"}
    rows = [json.dumps(row | {"problem": f"1+1+0*{n}"}) + "\n" for n in range(240)]
    (place / "rows.jsonl").write_text("".join(rows))
    (place / "gsm.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (place / "alpaca.jsonl").write_text('{"instruction": "1+1", "output": "2"}\n')
    nested = {"problem": "1+1", "solution": "It is 2.", "extra": {"ground_truth": "2"}}
    (place / "nested.jsonl").write_text(json.dumps(nested) + "\n")
    good = "model: {path: model}\ndata: {source: rows.jsonl}\n"
    (place / "good.yaml").write_text(good)
    (place / "other.yaml").write_text(good)
    (place / "other").mkdir()
    (place / "other" / "good.yaml").write_text(good)
    (place / "other" / "rows.jsonl").write_text("".join(rows))
    (place / "rows.xlsx").touch()
    (place / "rows.txt").touch()
    row = {"problem": "1+1", "solution": "It is 2.", "final": "2"}
    (place / "comment.jsonl").write_text("# my rows\n" + json.dumps(row) + "\n")
    (place / "target.jsonl").write_text('{"prompt": "1+1", "target": "2"}\n')
    (place / "weights").mkdir()
    (place / "weights" / "model.safetensors").touch()
    (place / "headless.csv").write_text("1+1,It is 2.,2\n1+2,It is 3.,3\n")
    (place / "q.gguf").touch()
    (place / "good.json").touch()
    (place / "comma.json").write_text('[\n  {\n    "problem": "1",\n  },\n  {}\n]\n')
    (place / "python.json").write_text("[\n  {'problem': '1'}\n]\n")
    (place / "latex.jsonl").write_text(r'{"problem": "\dfrac12"}' + "\n")
    (place / "final.jsonl").write_text(json.dumps(row) + "\n")
    row = {"problem": "1+1", "cot": "It is 2.", "answer": "2"}
    (place / "cot.jsonl").write_text(json.dumps(row) + "\n")
    (place / "study.yaml").write_text("quickstart: tiny\nmethods: [opsd]\n")
    for directory in ("model", "run/model", "tiny/opsd/model", "tiny/sft/model", "runs/b/model"):
        (place / directory).mkdir(parents=True)
        (place / directory / "config.json").write_text("{}")
    (place / "run" / "config.yaml").write_text(good)
    (place / "tiny" / "config.yaml").write_text(good)
    (place / "adapted").mkdir()
    (place / "adapted" / "adapter_config.json").write_text("{}")
    (place / "run" / "failed-step-7.pt").touch()
    for name, text in {"damaged": "{", "small": '{"max_position_embeddings": 256}'}.items():
        (place / name).mkdir()
        (place / name / "config.json").write_text(text)
    (place / "quick" / "grpo" / "model").mkdir(parents=True)
    (place / "quick" / "grpo" / "config.yaml").write_text(good)
    (place / "quick" / "quickstart.json").write_text("{}")
    (place / "stopped").mkdir()
    (place / "stopped" / "config.yaml").write_text(f"{good}train: {{precision: fp32}}\n")
    (place / "stopped" / "metrics.jsonl").write_text('{"step": 1}\n')
    for number, text in enumerate(CONFIGS):
        (place / f"config-{number}.yaml").write_text(text)
    return place


@pytest.fixture(scope="module")
def told(place):
    """What each command says: its exit code, its stderr, its seconds of processor time."""
    asked = [*MISTAKES, *(f"train config-{number}.yaml" for number in range(len(CONFIGS)))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TYPES]
    done = subprocess.run(
        command, input=json.dumps(asked), cwd=place, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(told, typed, wanted):
    code, error, seconds = told[typed]
    lines = error.splitlines()
    assert code in (1, 2), error
    assert wanted in lines[-1]
    assert lines[-1].startswith("opsd"), error
    # Above it at most a usage line, which fits a terminal.
    assert len(lines) == 1 or (len(lines) == 2 and lines[0].startswith("usage: opsd")), error
    assert len(lines[0]) <= 100 or len(lines) == 1
    assert seconds < 1.5  # the first also imports


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_told_with_its_mend(told, typed):
    check(told, typed, MISTAKES[typed])


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_a_config_of_mistakes_is_told_with_its_mend(told, number):
    check(told, f"train config-{number}.yaml", [*CONFIGS.values()][number])


STARTS = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from opsd.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "typed",
    [
        "quickstart --tiny",
        "train good.yaml",
        "plan model",
        "chat model",
        "eval model --benchmark rows.jsonl",
        "export adapted --merge --output merged",
    ],
)
def test_the_first_line_is_there_before_torch_is_imported(place, typed):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STARTS, *typed.split()]
    said = subprocess.run(command, cwd=place, env=environment, text=True, capture_output=True)
    assert "Start torch and transformers" in said.stdout + said.stderr
