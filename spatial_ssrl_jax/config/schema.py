"""Every setting of a run, as nested frozen dataclasses.

A field's type has its range (`Count`, `Bounds`) or, as a `Literal`, its choices.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from spatial_ssrl_jax.common.bounds import (
    Bounds,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Weights,
    Whole,
    Widths,
)
from spatial_ssrl_jax.common.reading import QuestionFields, Reading, Transparency
from spatial_ssrl_jax.qwen_vl.compute import Dtype, Remat
from spatial_ssrl_jax.qwen_vl.lora import LoraSettings
from spatial_ssrl_jax.tasks import TASKS, TASKS_BY_NAME, questions
from spatial_ssrl_jax.tasks.example import Example, Task, Tasks, TaskSettings

Schedule = Literal["constant", "cosine"]
AdvantageEstimator = Literal["grpo", "rloo"]
PolicyLoss = Literal["ppo", "gspo", "cispo"]
KlEstimator = Literal["k1", "k2", "k3"]
KlSchedule = Literal["constant", "linear", "cosine"]
Aggregation = Literal["token", "sequence", "dr_grpo"]
OldLogprobs = Literal["recomputed", "sampler"]
ImportanceCorrection = Literal["none", "truncate", "mask"]
ImportanceLevel = Literal["token", "sequence"]
RewardRule = Literal["paper", "strict", "tolerant", "numeric", "choice", "math"]
QuestionRule = Literal["same", RewardRule]
# (response, answer, example, tokens) -> the reward, or named parts of it.
RewardFunction = Callable[[str, str, Example, int], float | Mapping[str, float]]
PromptStyle = Literal["direct", "reasoning", "own"]
Ahead = Literal["auto", "always", "never"]
BestBy = Literal["auto", "benchmark", "heldout", "none"]

PATCHES_A_TOKEN = 4


@dataclass(frozen=True)
class ModelSettings:
    """Where the model comes from and how it computes.

    Attributes:
      path: a Hugging Face folder or an Orbax checkpoint of ours, local or `gs://…`, a Hub id, or
        `tiny` (shipped).
      from_scratch: draw fresh weights of the folder's shape instead of reading them.
      dtype: compute dtype; master weights are always float32.
      remat: what the backward pass recomputes of each layer: nothing (`none`), all but matmuls with
        weights and fused attention (`dots`), or all (`full`).
      attention: what computes attention of prompts, rows and whole images to themselves: `xla`
        anywhere, `splash` on TPUs, `cudnn` on NVIDIA GPUs in bfloat16; `auto` is `splash` on TPUs
        in bfloat16, else `xla`; `bench verify-kernels` says which is right on a device.
      attention_chunk: queries that attend at a time, by `xla`, by `cudnn` in rows, and in windows.
      vocab_block: entries of the vocabulary whose logits exist at a time, for all tokens.
    """

    path: str = ""
    from_scratch: bool = False
    dtype: Dtype = "bfloat16"
    remat: Remat = "full"
    attention: str = "auto"
    attention_chunk: Count = 1024
    vocab_block: Count = 4096


@dataclass(frozen=True)
class DataSettings:
    """Where images come from and what they are turned into.

    Attributes:
      source: a SPEC, for example `scenes`, `folder:PATH`, `rgbd:PATH,depth=inverse`, or several
        with tasks and weights: `shuffle,flip,crop@folder:PATH+depth,position@2*nyu:PATH`.
      transparency: what becomes of transparent pixels of its images: `white` blends them with
        white, `drop` takes their colours, mostly black, as the released code does.
      allow_outside_paths: paths in question files, those of `eval.benchmark` too, may leave the
        folder that is named.
      question_fields: names of the columns of `questions:` files where they are not the usual ones.
      heldout_fraction: fraction of the records kept apart for held-out metrics, never trained on.
      min_pixels, max_pixels: an image's area is brought between these, in pixels, before the
        model's own processor resizes it, as in the released trainers.
      prompt_buckets: prompt lengths in tokens that programs are compiled for.
      patch_buckets: patches of a prompt's images in each of them, one token of four; none named is
        four a token.
      threads: threads that make prompts ahead of the devices, in each worker.
      workers: processes that make prompts; 0 makes them in the training process, by threads alone.
      max_bad_fraction: fraction of unusable images above which the run stops.
    """

    source: str = "scenes"
    transparency: Transparency = "white"
    allow_outside_paths: bool = False
    question_fields: QuestionFields = field(default_factory=QuestionFields)
    heldout_fraction: Annotated[float, Bounds(min=0, below=1)] = 0.05
    min_pixels: Count = 262_144
    max_pixels: Count = 4_194_304
    prompt_buckets: Widths = (1024, 2048, 4096)
    patch_buckets: Annotated[tuple[int, ...], Bounds(min=0)] = ()
    threads: Count = 8
    workers: Whole = 0
    max_bad_fraction: Fraction = 0.2

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """Tokens and patches of the prompts that programs are compiled for, ascending."""
        patches = self.patch_buckets or [PATCHES_A_TOKEN * n for n in self.prompt_buckets]
        return tuple(sorted(zip(self.prompt_buckets, patches, strict=True)))

    @property
    def reading(self) -> Reading:
        """How the run's sources read their files."""
        return Reading(self.transparency, self.allow_outside_paths, fields=self.question_fields)


@dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis while training, and how long their processes wait for one another.

    TPU slices that are joined by the data-centre network are along `data`, which must then be a
    multiple of their number.

    Attributes:
      data, fsdp, tensor: devices along the axis; one may be -1 and takes what is left.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as lost, and the
        others end.
      step_timeout: seconds that a step, or any other phase that is logged, may take before the run
        counts as hanging and ends; 0 waits for ever.
    """

    data: Annotated[int, Bounds(min=-1)] = 1
    fsdp: Annotated[int, Bounds(min=-1)] = -1
    tensor: Annotated[int, Bounds(min=-1)] = 1
    heartbeat_timeout: Count = 60
    step_timeout: Whole = 3600


@dataclass(frozen=True)
class CompileSettings:
    """Compiled programs, which a restart reads instead of compiling them again.

    Attributes:
      cache: their folder, local or `gs://…`; empty is `compilation_cache` in the run's folder, and
        `none` keeps none. JAX's own JAX_COMPILATION_CACHE_DIR comes first.
      cache_gb: its size at most, in GB: the programs that were not used for longest go, in a bucket
        those that were written first, when a run starts.
      ahead: whether threads compile programs before they are called, those of GRPO's updates and
        all sizes of a rollout, when a rollout starts: `always`, `never`, or `auto`, on TPUs alone,
        as elsewhere the compiler takes what the run computes with.
    """

    cache: str = ""
    cache_gb: Positive = 10.0
    ahead: Ahead = "auto"


@dataclass(frozen=True)
class StageSettings:
    """What both stages have.

    Attributes:
      steps: steps of the stage; 0 skips it.
      prompts: prompts a step.
      learning_rate: peak learning rate.
      warmup_ratio: fraction of the optimizer steps over which it rises linearly.
      schedule: `constant` or `cosine` (to zero).
      weight_decay: decoupled decay on all trained weights.
      freeze: parts that do not train: `vision`, `merger`, `language`.
      vision_learning_rate_scale: the vision tower's learning rate over that of the rest.
      lora: with a rank, adapters are trained and nothing else; they are merged at the end.
      row_tokens, row_patches, row_responses: tokens, patches and response tokens of a row,
        in which prompts with all their responses are packed one after another; a number each for
        each size that programs are compiled for. A step takes the one or two in which it costs
        least. The last one is raised to hold the largest prompt with responses of
        `rollout.max_new_tokens`. None named derives three from the buckets of `data`; `bench
        padding` measures what they are worth.
      micro_batch_rows: rows whose activations exist at a time.
    """

    steps: Whole = 0
    prompts: Count = 256
    learning_rate: NonNegative = 1e-5
    warmup_ratio: Fraction = 0.0
    schedule: Schedule = "constant"
    weight_decay: NonNegative = 0.0
    freeze: tuple[str, ...] = ()
    vision_learning_rate_scale: Positive = 1.0
    lora: LoraSettings = field(default_factory=LoraSettings)
    row_tokens: Annotated[tuple[int, ...], Bounds(min=1)] = ()
    row_patches: Annotated[tuple[int, ...], Bounds(min=0)] = ()
    row_responses: Annotated[tuple[int, ...], Bounds(min=1)] = ()
    micro_batch_rows: Count = 16

    @property
    def responses_per_prompt(self) -> int:
        """Responses to each prompt that an optimizer step trains on."""
        return 1

    def trains(self, part: str) -> bool:
        """Whether any weight of a part (`vision`, `merger` or `language`) trains."""
        if self.lora.rank:
            return any(target.split(".")[0] == part for target in self.lora.targets)
        return part not in self.freeze


@dataclass(frozen=True)
class SftSettings(StageSettings):
    """Supervised fine-tuning on responses in the required format: the paper's cold start.

    Attributes:
      steps: optimizer steps; 0 skips the stage.
      prompts: examples an optimizer step.
      examples: the stage's distinct examples, which it learns again and again in another order; the
        last batch of each time may be smaller. 0 has new ones in every step.
      responses: `synthetic`, made of the true reasons of the examples of `data.source`, or those of
        a file: the path of released cold-start data (see the source `ssrl81k`), or
        `questions:PATH`. The stage then uses its questions: all of them, or `examples` of them.
      task_shares: with such a file, how often each task comes: as in the `file`, or by the weights
        of `tasks`.
    """

    warmup_ratio: Fraction = 0.1
    schedule: Schedule = "cosine"
    examples: Whole = 3600
    responses: str = "synthetic"
    task_shares: Literal["file", "tasks"] = "file"
    micro_batch_rows: Count = 8

    @property
    def responses_spec(self) -> str | None:
        """The SPEC of the file with responses; None where they are made of `data.source`."""
        if self.responses == "synthetic":
            return None
        is_spec = self.responses.startswith(("questions:", "ssrl81k:"))
        return self.responses if is_spec else f"ssrl81k:{self.responses}"


@dataclass(frozen=True)
class GrpoSettings(StageSettings):
    """Group-relative policy optimisation (GRPO, arXiv 2402.03300); the defaults are the paper's.

    Attributes:
      steps: rollouts; 0 skips the stage.
      prompts: prompts a rollout.
      minibatches_per_rollout: optimizer steps a rollout, each over an equal part of its prompts.
      group_size: G, samples a prompt.
      init_from: a folder or a checkpoint of ours, local or `gs://…`, or a Hub id whose weights the
        stage starts from, in place of the model's; needs `sft.steps=0`.
      lora: as of every stage; with LoRA the KL's reference is the base itself.
      temperature: of sampling, and of the log-probabilities.
      advantage: a sample's reward less the mean of its group (`grpo`), or less the mean of the
        others in the group (`rloo`, arXiv 2402.14740; needs `scale_rewards=False`).
      scale_rewards: divide the advantage by the group's standard deviation; off in Dr. GRPO, arXiv
        2503.20783.
      policy_loss: `ppo`, which clips the ratio of each token (arXiv 1707.06347); `gspo`, which
        clips that of each sample, the geometric mean over its tokens (arXiv 2507.18071, with
        `aggregation="sequence"`, `clip_low=3e-4` and `clip_high=4e-4`); or `cispo`, which clips a
        token's ratio as a constant weight of its log-probability, so that no token is left out
        (arXiv 2506.13585, with `clip_low=1`; needs `dual_clip=0`).
      clip_low: ε_low of the ratio's clip (PPO, arXiv 1707.06347).
      clip_high: ε_high of the ratio's clip (DAPO, arXiv 2503.14476).
      dual_clip: c of the dual clip (arXiv 1912.09729): for a negative advantage A the loss is at
        most -c·A; 0 turns it off.
      kl_coef: β, weight of the KL to the reference in the loss; 0 needs no reference.
      kl_schedule: β over the stage's steps: `constant`, or `linear` or `cosine` decay from
        `kl_coef` at the first one to zero after the last.
      kl_estimator: k1, k2 or k3 of Schulman's "Approximating KL divergence"; k3 is never negative
        and of low variance.
      aggregation: how tokens are averaged: over all tokens of the optimizer step (`token`, DAPO),
        within each sample first (`sequence`, GRPO), or by a constant (`dr_grpo`).
      old_logprobs: π_old of the ratio: `recomputed` by the trainer before the updates, for those
        after the first, or the `sampler`'s own.
      importance_correction: weight tokens by the ratio of trainer to sampler: `none`, `truncate` it
        at `importance_max` (truncated importance sampling), or `mask` what is outside
        [1/importance_max, importance_max]; needs `old_logprobs="recomputed"`.
      importance_level: that ratio is each `token`'s own, or of a whole `sequence`, the product over
        its tokens.
      importance_max: the ratio's bound, at least 1.
      mask_truncated_completions: leave samples that reached `rollout.max_new_tokens` without an end
        token out of the loss (overlong filtering, DAPO).
      filter_groups: leave out groups whose `filter_key` does not vary, or has a mean that is not
        above `filter_low` and below `filter_high`, and sample others in their place (dynamic
        sampling, DAPO).
      filter_key: `accuracy`, or `overall`, the whole reward.
      filter_low, filter_high: of a group's mean; 0 and 1 set no limit.
      max_resamples: at most so many times a step groups are sampled again for that.
    """

    steps: Whole = 360
    learning_rate: NonNegative = 1e-6
    weight_decay: NonNegative = 0.01
    minibatches_per_rollout: Count = 2
    group_size: Count = 5
    init_from: str = ""
    temperature: Positive = 1.0
    advantage: AdvantageEstimator = "grpo"
    scale_rewards: bool = True
    policy_loss: PolicyLoss = "ppo"
    clip_low: Annotated[float, Bounds(above=0, max=1)] = 0.2
    clip_high: Positive = 0.3
    dual_clip: NonNegative = 3.0
    kl_coef: NonNegative = 0.01
    kl_schedule: KlSchedule = "constant"
    kl_estimator: KlEstimator = "k3"
    aggregation: Aggregation = "token"
    old_logprobs: OldLogprobs = "recomputed"
    importance_correction: ImportanceCorrection = "none"
    importance_level: ImportanceLevel = "token"
    importance_max: Annotated[float, Bounds(min=1)] = 2.0
    mask_truncated_completions: bool = False
    filter_groups: bool = False
    filter_key: Literal["accuracy", "overall"] = "accuracy"
    filter_low: Annotated[float, Bounds()] = 0.0
    filter_high: Annotated[float, Bounds()] = 1.0
    max_resamples: Whole = 2

    @property
    def responses_per_prompt(self) -> int:
        """G."""
        return self.group_size

    @property
    def copies_reference(self) -> bool:
        """Whether the KL's reference is a copy of the trained weights.

        Without a KL there is none, and with LoRA it is the frozen base.
        """
        return self.kl_coef > 0 and not self.lora.rank

    @property
    def recomputes_old_logprobs(self) -> bool:
        """Whether the trainer's log-probabilities of before the updates are computed.

        In the first update they are the current ones.
        """
        return self.minibatches_per_rollout > 1 and self.old_logprobs == "recomputed"

    @property
    def reuses_vision(self) -> bool:
        """Whether images are encoded once a step for old and reference log-probabilities and the
        update: where the vision tower does not train, and more than one of them needs it.
        """
        return not self.trains("vision") and (self.kl_coef > 0 or self.recomputes_old_logprobs)


@dataclass(frozen=True)
class RewardSettings:
    """What a response earns; the defaults are the paper's.

    Attributes:
      rule: whether answer and format are right: `paper`; `strict` (a thought and after it a box,
        neither empty); or, with the paper's format, `tolerant` (spaces, `\\text{…}` and
        parentheses around the answer are accepted), `numeric` (numbers within `tolerance`),
        `choice` (the letter of an option, with or without its text) or `math` (equal as
        expressions, by the package math-verify).
      question_rule: the rule of questions of one's own where it is another than that of the tasks.
      accuracy_weight: weight of accuracy; the format has the rest.
      partial_credit: a wrong answer to a task that grades its answers earns a part of the
        accuracy's reward, see `Task.grade`.
      tolerance: of `numeric`, relative to the right number.
      function: a reward of one's own, which takes the place of accuracy and format: (response,
        answer, example, tokens) -> a finite number, or a mapping of named parts with their sum, or
        their `overall`, as the reward. A part named `accuracy` or `format` replaces the rule's in
        the metrics. The example comes without its images. On a command line: FILE.py:NAME.
      workers: processes that rewards are computed in, for `function` and `math`.
      timeout: seconds that they may take for a response.
      max_failed_fraction: fraction of a step's responses without a reward, as it failed or took
        longer, above which the run stops; up to it they earn 0.
      task_weights: factor on the reward of each task.
      length_penalty: taken off at `length_penalty_start + length_penalty_span` tokens and more.
      length_penalty_start: tokens up to which nothing is taken off; from there it rises linearly.
      length_penalty_span: tokens over which it rises.
    """

    rule: RewardRule = "paper"
    question_rule: QuestionRule = "same"
    accuracy_weight: Fraction = 0.9
    partial_credit: bool = False
    tolerance: NonNegative = 0.01
    function: RewardFunction | None = None
    workers: Count = 4
    timeout: Positive = 10.0
    max_failed_fraction: Fraction = 0.1
    task_weights: Weights = field(
        default_factory=lambda: dict.fromkeys([*TASKS_BY_NAME, questions.TASK.name], 1.0)
    )
    length_penalty: NonNegative = 0.0
    length_penalty_start: Whole = 1024
    length_penalty_span: Count = 1024

    @property
    def needs_math_verify(self) -> bool:
        """Whether answers are compared as expressions, by the package math-verify."""
        return "math" in (self.rule, self.question_rule)

    def rule_of(self, task: str) -> RewardRule:
        """The rule of a task's answers."""
        if task != questions.TASK.name or self.question_rule == "same":
            return self.rule
        return self.question_rule


@dataclass(frozen=True)
class RolloutSettings:
    """How responses are sampled.

    Attributes:
      max_new_tokens: tokens of a response at most.
      kv_block: slots of the responses' key/value cache at the start; they double as responses grow.
        Each size is a decode program: an eighth of `max_new_tokens` makes eight, with those for
        the few samples that are left at the end.
      check_every: decode steps between checks whether all samples have finished.
      batch_prompts: prompts that are sampled at a time; 0 takes as many of a step's as memory
        holds if every prompt and response were the longest.
      prefill_prompts: of them, prompts that are prefilled at a time at most, one a shard at least.
      tensor: devices that share one copy of the weights while sampling; no more of them than the
        model has key/value heads, or caches are held twice.
      attention: what computes a decode step's attention: `xla` anywhere, `triton` one kernel on
        NVIDIA GPUs in bfloat16; `auto` is `triton` on one GPU of compute capability 9.0, where it
        was run, else `xla`; `bench verify-kernels` checks it.
    """

    max_new_tokens: Count = 2048
    kv_block: Count = 256
    check_every: Count = 8
    batch_prompts: Whole = 0
    prefill_prompts: Count = 64
    tensor: Count = 1
    attention: str = "auto"


@dataclass(frozen=True)
class OptimSettings:
    """AdamW, shared by both stages.

    Attributes:
      beta1, beta2, eps: AdamW's constants.
      max_grad_norm: gradients are scaled down to this norm.
      max_skipped_steps: non-finite steps in a row after which the run stops.
      offload: AdamW's moments and the KL's reference are kept in host memory while no program needs
        them; for a single GPU.
    """

    beta1: Annotated[float, Bounds(min=0, below=1)] = 0.9
    beta2: Annotated[float, Bounds(min=0, below=1)] = 0.999
    eps: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    max_skipped_steps: Count = 5
    offload: bool = False


@dataclass(frozen=True)
class CheckpointSettings:
    """Saving.

    Attributes:
      every: steps between checkpoints; the last step of a stage is always saved.
      keep: newest checkpoints kept.
      best: what the best checkpoint, which is kept besides, is chosen by: the score of
        `eval.benchmark` (`benchmark`), the mean greedy accuracy on held-out images (`heldout`), the
        first of these that there is (`auto`), or `none`. A step that is better than all before is
        saved.
    """

    every: Count = 5
    keep: Count = 3
    best: BestBy = "auto"


@dataclass(frozen=True)
class LogSettings:
    """What is written during a run.

    Attributes:
      rollouts_every: GRPO steps between samples of rollouts; 0 writes none.
      rollouts_count: prompts in a sample.
      report_every: steps between refreshes of `report.html`.
      wandb: W&B project that the metrics go to as well; needs the extra `[wandb]`. Empty: none.
    """

    rollouts_every: Whole = 10
    rollouts_count: Whole = 4
    report_every: Count = 10
    wandb: str = ""


@dataclass(frozen=True)
class EvalSettings:
    """Validation: held-out examples, and perhaps a benchmark.

    Attributes:
      examples: held-out examples a task.
      samples: sampled responses a held-out prompt, at the training temperature; a greedy one is
        sampled with them.
      every: GRPO steps between held-out evaluations; 0 evaluates between stages only.
      batch_prompts: prompts evaluated at a time.
      benchmark: one of `evaluate`'s benchmarks that is evaluated during training, greedily, with
        the limits of `rollout` and `data`; empty: none.
      benchmark_data: its files, as `evaluate --data` takes them.
      benchmark_style: how its questions are prompted: `direct`, `reasoning` or `own`, see
        `evaluate`.
      benchmark_count: questions of it, evenly over the file; 0 takes all.
      benchmark_every: GRPO steps between; 0 evaluates it between stages only.
    """

    examples: Count = 64
    samples: Count = 4
    every: Whole = 0
    batch_prompts: Count = 64
    benchmark: str = ""
    benchmark_data: str = ""
    benchmark_style: PromptStyle = "reasoning"
    benchmark_count: Whole = 200
    benchmark_every: Whole = 0


@dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
      name: of the run.
      seed: of every draw.
      tasks: settings by the name of a task; one that is not given has its defaults.
      extra_tasks: tasks beside those of the package. Their functions may stand in a config file.
    """

    name: str
    seed: Annotated[int, Bounds(min=0, below=2**31)] = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tasks: dict[str, TaskSettings] = field(default_factory=dict)
    extra_tasks: tuple[Task[Any], ...] = ()
    mesh: MeshSettings = field(default_factory=MeshSettings)
    compile: CompileSettings = field(default_factory=CompileSettings)
    sft: SftSettings = field(default_factory=SftSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)

    def __post_init__(self):
        if isinstance(self.tasks, dict):  # else it is refused with a sentence
            known = [task for task in self.all_tasks if isinstance(task, Task)]
            defaults = {task.name: task.settings() for task in known}
            object.__setattr__(self, "tasks", defaults | self.tasks)

    @property
    def all_tasks(self) -> tuple[Task[Any], ...]:
        """The package's tasks, questions of one's own, and the extra tasks."""
        return (*TASKS, questions.TASK, *self.extra_tasks)

    @property
    def task_settings(self) -> Tasks:
        """Every task with its settings."""
        return {task: self.tasks[task.name] for task in self.all_tasks}
