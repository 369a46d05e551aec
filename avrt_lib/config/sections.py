"""The sections of a run's configuration: strict, with units in the names, and the rules within each of them.

Defaults are the paper's numbers where it gives them. Each such field carries its source (``paper``, ``authors'
correction`` or ``ours``); ``avrt fidelity`` prints the table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PAPER = "paper"
CORRECTION = "authors' correction"
OURS = "ours"

#: A model of a hub by its id: ``hub:ORG/NAME``, or ``hub:ORG/NAME/ADAPTER`` for an adapter of it that is merged in.
HUB = "hub:"
COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
#: What git may be sent to; it would run a program for ``ext::``, and take a leading dash for an option.
_GIT_ADDRESS = re.compile(r"(https://|ssh://|file:///|/|[\w.-]+@[\w.-]+:)[^\s]+$")
_PASSWORD = re.compile(r"\w+://[^/@]*:[^/@]*@|https://[^/]*@")
#: An address that nobody needs to hide: no user, no password, no query.
_API_ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^\s/@?#:\[\]]+)(:\d+)?(/[^\s?#]*)?")


def _sourced(default: Any, source: str, **constraints: Any) -> Any:
    return Field(default, json_schema_extra={"source": source, "paper": default}, **constraints)


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SourceConfig(Section):
    """Where the questions of one split come from."""

    format: str = Field(description="name of a reader: avqa, daily-omni, manifest, miniature …")
    path: str | None = Field(None, description="the data set's folder or file; the miniature renders its own")
    count: int | None = Field(None, ge=1, description="read at most this many; for the miniature: render this many")
    seed: int = Field(0, description="miniature: the seed of the rendered world")
    columns: dict[str, str] = Field(default_factory=dict, description="manifest: our name -> the file's column")


class DataConfig(Section):
    """The samples: where they come from and what is kept of their media."""

    train: SourceConfig | None = None
    validation: SourceConfig | None = None
    test: SourceConfig | None = None
    all: SourceConfig | None = Field(None, description="one source, split by clip, instead of the three above")
    validation_share: float = Field(0.1, gt=0, lt=0.5)
    test_share: float = Field(0.2, gt=0, lt=0.5)
    minimum_clips: int = Field(10, ge=3, description="fewer clips than this cannot be split by clip")
    overlap_splits: bool = Field(False, description="let every clip stand in all splits: a check of the path only")
    frames: int = _sourced(8, PAPER, ge=1, le=256)
    audio_seconds: float = _sourced(10.0, PAPER, gt=0)
    frame_longest_side_px: int = Field(448, ge=28)
    jpeg_quality: int = Field(92, ge=50, le=100)
    workers: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _one_way_to_name_splits(self) -> Self:
        parts = [self.train, self.validation, self.test]
        if self.all is not None and any(parts):
            raise ValueError("give either data.all (split by clip) or data.train/validation/test, not both")
        if self.all is None and not all(parts):
            raise ValueError("data.train, data.validation and data.test are all needed (or data.all, which is split)")
        return self


def _check_remote_code(model: str, revision: str | None) -> None:
    """Refuse a model's own Python where it is not a file of a pinned model that lies here or in the store."""
    if model.startswith(HUB):
        return  # models.lock pins it; without its entry nothing is loaded
    if model.startswith("s3://"):
        if not re.fullmatch(r"[0-9a-f]{64}", model.rpartition("/")[2]):
            raise ValueError(
                f"trust_remote_code: {model} does not end in a content hash; publish the model with `avrt models pull`"
            )
    elif not model.startswith(("/", ".", "~")):
        raise ValueError(
            f"trust_remote_code: {model} is no folder and no s3:// address; code is never run from a hub: use "
            "`avrt models pull` or `avrt models prepare`"
        )
    if revision is None or not COMMIT.fullmatch(revision):
        raise ValueError(
            "trust_remote_code runs the model's own Python: pin it by revision (the commit's full hash, which "
            "`avrt models` writes into models.lock), or set trust_remote_code: false"
        )


class EngineConfig(Section):
    """Which model answers, where, and how it decodes."""

    kind: Literal["vllm", "endpoint"] = "vllm"
    model: str = Field(description="builtin:NAME, hub:ORG/NAME, a folder, s3://…; an endpoint's served model name")
    revision: str | None = Field(None, description="of a hub model: branch, tag or commit; the lock makes it a commit")
    base_url: str | None = Field(None, description="endpoint: its OpenAI address, ending in /v1")
    api_key_env: str | None = Field(None, description="endpoint: the environment variable that holds its key")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = Field(8192, ge=128)
    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, lt=1)
    kv_cache_gib: float = Field(1.0, gt=0, description="CPU only: memory for the KV cache")
    max_tokens: int = Field(2048, ge=1)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    trust_remote_code: bool = False
    concurrency: int = Field(32, ge=1, description="endpoint: requests in flight")
    timeout_s: float = Field(300.0, gt=0)
    attempts: int = Field(5, ge=1, description="endpoint: tries of one request")

    @model_validator(mode="after")
    def _endpoint_has_an_address(self) -> Self:
        if self.kind == "endpoint" and not self.base_url:
            raise ValueError("an endpoint engine needs base_url (for example http://teacher.models.svc/v1)")
        if self.base_url and not _API_ADDRESS.fullmatch(self.base_url):
            raise ValueError(
                "base_url must be http(s)://HOST[:PORT]/PATH without a user, a password or a query: name the key's "
                "variable in api_key_env"
            )
        if self.trust_remote_code:
            if self.kind == "endpoint":
                raise ValueError("trust_remote_code is for models that are loaded here: say it where the endpoint runs")
            _check_remote_code(self.model, self.revision)
        return self


class TeacherConfig(Section):
    """One single-modality teacher."""

    engine: EngineConfig
    prompt: str
    attempts: int = Field(1, ge=1, le=8, description="samples tried until one has a valid answer")


class TeachersConfig(Section):
    """Both teachers and how their work is cut up."""

    vision: TeacherConfig
    audio: TeacherConfig
    shards: int = Field(2, ge=1, le=512)
    parallelism: int = Field(2, ge=1)
    chunk_rows: int = Field(256, ge=1, description="rows that are committed together; a killed step loses one chunk")


class MergerConfig(Section):
    """The text-only model that merges two traces into one."""

    engine: EngineConfig
    prompt: str = "labelled"
    keep: Literal["both", "all"] = _sourced("both", PAPER)
    max_words: int = Field(400, ge=1)
    chunk_rows: int = Field(256, ge=1)


class ValidationConfig(Section):
    """The gate before training."""

    minimum_rows: int = Field(16, ge=1)
    max_flagged_share: float = Field(0.05, ge=0, le=1)
    max_letter_share: float = Field(0.6, gt=0, le=1, description="no answer letter may stand for more of the rows")


class LoraConfig(Section):
    """Low-rank adapters beside the student's language model; they are merged into it when the model is written."""

    rank: int = Field(32, ge=1)
    alpha: float = Field(64.0, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="linear layers of the language model, by the last part of their names",
    )


class StudentConfig(Section):
    """The model that learns."""

    model: str
    revision: str | None = None
    prompt: str = "reason"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    freeze: list[str] = _sourced(["audio_tower", "visual"], PAPER)
    video_longest_side_px: int = Field(448, ge=28, description="frames enter the student at most this large")
    max_model_len: int = Field(8192, ge=128)
    kv_cache_gib: float = Field(1.0, gt=0)
    trust_remote_code: bool = False
    lora: LoraConfig | None = Field(None, description="train adapters instead of all weights; the paper trains all")

    @model_validator(mode="after")
    def _code_is_pinned(self) -> Self:
        if self.trust_remote_code:
            _check_remote_code(self.model, self.revision)
        return self


class OptimizerConfig(Section):
    """What SFT and GRPO share."""

    optimizer_betas: tuple[float, float] = _sourced((0.9, 0.999), PAPER)
    weight_decay: float = _sourced(0.01, PAPER, ge=0)
    per_device_batch: int = Field(1, ge=1)
    gradient_accumulation: int = Field(8, ge=1)
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = _sourced("cosine", PAPER)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = True
    deepspeed: Literal["none", "zero2", "zero2_offload"] = _sourced("zero2_offload", PAPER)
    save_every_steps: int = Field(50, ge=1)
    logging_every_steps: int = Field(5, ge=1)
    processes: int | None = Field(
        None,
        ge=1,
        description="of one machine; None: one for each visible GPU, and one where there is none. Fewer GPUs than this "
        "share out the same batch",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a training process; None: its share of the cores"
    )


class SftConfig(OptimizerConfig):
    """The cold start on merged traces."""

    learning_rate: float = _sourced(2e-6, PAPER, gt=0)
    warmup_steps: int = _sourced(100, PAPER, ge=0)
    epochs: float = _sourced(1.0, PAPER, gt=0)
    max_steps: int | None = Field(None, ge=1, description="a cap on the steps, whatever the epochs")
    target: Literal["reasoning", "answer"] = Field("reasoning", description="answer: the control without traces")
    modality_dropout: float = _sourced(0.0, OURS, ge=0, lt=1)
    modality_dropout_types: dict[str, Annotated[float, Field(ge=0, lt=1)]] = _sourced(
        {}, OURS, description="another share for the questions of some types"
    )
    modality_dropout_vision_only: float = _sourced(
        0.5, OURS, ge=0, le=1, description="the share of those rows that lose the sound; the others lose the sight"
    )
    type_balance: float = _sourced(0.0, OURS, ge=0, le=2)
    stop_low: float | None = _sourced(
        None, OURS, gt=0, lt=1, description="stop at the first validation accuracy this high"
    )
    stop_high: float = _sourced(0.8, OURS, gt=0, le=1, description="… and not higher: go back and take smaller steps")
    stop_type_low: float = _sourced(
        0.0, OURS, ge=0, lt=1, description="… and only where every common question type is at least this accurate"
    )
    cooldown_from: float | None = _sourced(
        None,
        OURS,
        gt=0,
        lt=1,
        description="from this validation accuracy on the rate falls to nothing; then it may stop",
    )
    cooldown_steps: int = _sourced(20, OURS, ge=1, description="within so many steps")
    validate_every_steps: int = _sourced(10, OURS, ge=1)
    validation_samples: int = Field(128, ge=1)

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.stop_low is not None and self.stop_low >= self.stop_high:
            raise ValueError("stop_low must be below stop_high")
        if self.cooldown_from is not None and (self.stop_low is None or self.cooldown_from > self.stop_high):
            raise ValueError("cooldown_from needs stop_low, and must not be above stop_high")
        return self


class RewardConfig(Section):
    """R = R_format + R_accuracy + R_length."""

    length_mean_words: float = _sourced(100.0, PAPER, gt=0)
    length_sd_words: float = _sourced(20.0, PAPER, gt=0)
    bonus: float = _sourced(0.5, OURS, ge=0)
    bonus_from_words: int = _sourced(100, CORRECTION, ge=0)
    bonus_to_words: int = _sourced(200, CORRECTION, ge=0)

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.bonus_from_words > self.bonus_to_words:
            raise ValueError("bonus_from_words must not exceed bonus_to_words")
        return self


class GrpoConfig(OptimizerConfig):
    """Group-relative policy optimisation on the full training set."""

    learning_rate: float = _sourced(1e-6, OURS, gt=0)
    warmup_steps: int = _sourced(0, OURS, ge=0)
    epochs: float = _sourced(1.0, OURS, gt=0)
    max_steps: int | None = Field(None, ge=1)
    group_size: int = _sourced(4, PAPER, ge=2)
    clip_epsilon: float = _sourced(0.2, PAPER, gt=0)
    kl_beta: float = _sourced(0.01, PAPER, ge=0)
    temperature: float = _sourced(1.0, PAPER, gt=0)
    max_completion_tokens: int = _sourced(512, OURS, ge=8)
    modality_dropout: float = _sourced(
        0.0, OURS, ge=0, lt=1, description="the share of groups whose question loses its sound or its sight"
    )
    type_weights: dict[str, Annotated[float, Field(gt=0)]] = _sourced(
        {}, OURS, description="how often questions of a type are asked, against the others; 1 for those not named"
    )
    reward: RewardConfig = Field(default_factory=RewardConfig)


class EvaluationConfig(Section):
    """Greedy decoding for every model alike."""

    max_tokens: int = Field(1024, ge=1)
    conditions: list[Literal["av", "audio_only", "vision_only"]] = Field(
        default_factory=lambda: ["av", "audio_only", "vision_only"]  # type: ignore[arg-type]
    )
    endpoint: EngineConfig | None = Field(None, description="ask this endpoint in the base's place")
    chunk_rows: int = Field(256, ge=1)
    processes: int = Field(1, ge=1, description="engines side by side")
    bootstrap_samples: int = Field(2000, ge=100)

    @model_validator(mode="after")
    def _an_endpoint(self) -> Self:
        if self.endpoint is not None and self.endpoint.kind != "endpoint":
            raise ValueError("endpoint needs kind: endpoint; a model folder is named by student.model")
        return self


class PromotionConfig(Section):
    """When a trained model becomes the champion."""

    model_name: str = Field("avrt-student", pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    alpha: float = Field(0.05, gt=0, lt=1, description="of the paired test against the base on the validation set")
    parity_samples: int = Field(4, ge=0, description="prompts on which vLLM and transformers must agree")
    parity_tolerance: float = Field(0.05, gt=0, description="largest difference of a log-probability")


class GitConfig(Section):
    """How a promotion enters the repository that the cluster follows (target ``git``)."""

    mode: Literal["push", "pull_request"] = Field("push", description="onto the branch, or for others to merge")
    token_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable with the token for git over https and for the forge",
    )
    forge: Literal["github", "gitlab", "gitea"] | None = Field(None, description="pull_request: whose API it is")
    api_url: str | None = Field(
        None,
        pattern=r"^(https://|http://(localhost|127\.0\.0\.1)[:/])[^\s@]+$",  # it gets the token
        description="pull_request: None takes the forge's usual address at the repository's host",
    )
    project: str | None = Field(
        None, pattern=r"^[\w.~-]+(/[\w.~-]+)+$", description="pull_request: OWNER/NAME; None takes the URL's path"
    )
    signing: Literal["gpg", "ssh"] | None = Field(None, description="sign commits; None leaves it to git's settings")
    signing_key: str | None = Field(
        None, pattern=r"^[^-].*$", description="gpg: id of the key, ssh: its file; None takes git's user.signingKey"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.mode == "pull_request" and not (self.forge and self.token_env):
            raise ValueError("mode pull_request needs forge, and token_env, the variable that holds the forge's token")
        if self.signing_key and not self.signing:
            raise ValueError("signing_key needs signing: gpg or ssh")
        return self


class DeploymentConfig(Section):
    """Where the champion is served."""

    target: Literal["local", "kserve", "git"] = "local"
    namespace: str = "avrt"
    probe_questions: int = Field(3, ge=1)
    serve_unpromoted: bool = Field(False, description="serve the last trained model for the check alone")
    start_timeout_s: float = Field(600.0, gt=0)
    request_timeout_s: float = Field(60.0, gt=0)
    runtime: str = Field("avrt-vllm", description="cluster: the serving runtime that holds the launcher")
    service_account: str = Field("avrt-models", description="cluster: may read the model store")
    cpu: str = Field("4", description="cluster: CPU cores that the predictor asks for, as a Kubernetes quantity")
    cpu_limit: str | None = Field(
        None, description="cluster: the most that it may use; as many as it asks for if not given"
    )
    memory: str = Field("16Gi", description="cluster: memory of the predictor, as a Kubernetes quantity")
    gpus: int = Field(1, ge=0, description="cluster: GPUs of the predictor")
    route: str | None = Field(None, description="kserve: users' HTTPRoute; a candidate gets a share of the requests")
    split_percent: int = Field(10, ge=1, le=99, description="route: the candidate's share of the requests")
    split_seconds: float = Field(300.0, gt=0, description="route: for how long it has that share")
    manifests_url: str | None = Field(None, description="git: the repository that the cluster follows")
    manifests_branch: str = Field("main", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*$")
    manifests_path: str = Field("models", description="git: folder of the model's folder; relative, without ..")
    git: GitConfig = Field(default_factory=GitConfig)

    @model_validator(mode="after")
    def _git_has_a_repository(self) -> Self:
        if self.target == "git" and not self.manifests_url:
            raise ValueError("target git needs manifests_url, the repository that the cluster follows")
        if self.target == "git" and self.route:
            raise ValueError("target git makes no candidate that could get a share of route: unset route")
        if self.manifests_url and not _GIT_ADDRESS.match(self.manifests_url):
            raise ValueError("manifests_url must be an address that starts with https, ssh or file, or USER@HOST:PATH")
        if self.manifests_url and _PASSWORD.match(self.manifests_url):
            # The configuration is kept with the run and shown to everybody who may see it.
            raise ValueError("manifests_url must not hold a password: name the token's variable in git.token_env")
        if self.manifests_path.startswith("/") or ".." in self.manifests_path.split("/"):
            raise ValueError("manifests_path must be a relative path without ..")
        return self


class StoreConfig(Section):
    """Where models are published."""

    kind: Literal["s3", "local"] = "s3"
    bucket: str = "avrt"


class TrackingConfig(Section):
    """MLflow."""

    experiment: str = "avrt"


class Config(Section):
    """The whole configuration of a run."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    seed: int = 0
    data: DataConfig
    teachers: TeachersConfig
    merger: MergerConfig
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    student: StudentConfig
    sft: SftConfig = Field(default_factory=SftConfig)
    grpo: GrpoConfig = Field(default_factory=GrpoConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    promotion: PromotionConfig = Field(default_factory=PromotionConfig)
    deployment: DeploymentConfig = Field(default_factory=DeploymentConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    accepted_licences: list[str] = Field(
        default_factory=list, description="ids of models whose restricted licence the user has read and accepts"
    )

    @model_validator(mode="after")
    def _adapters_train_alone(self) -> Self:
        for name, section in (("sft", self.sft), ("grpo", self.grpo)):
            if self.student.lora is not None and section.deepspeed != "none":
                raise ValueError(
                    f"student.lora trains few weights, which need no ZeRO: set {name}.deepspeed to none, or "
                    "student.lora to null"
                )
        return self

    def part(self, keys: Collection[str]) -> Config:
        """The configuration with these of its keys alone; reading another one raises ``AttributeError``."""
        part = self.model_copy()
        for key in part.__dict__.keys() - set(keys):
            del part.__dict__[key]
        return part

    def to_json(self) -> str:
        """The configuration, or a part of it, as the JSON text that travels through the pipeline."""
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":"), sort_keys=True, ensure_ascii=False)

    @property
    def sha256(self) -> str:
        """Hash of the configuration's JSON text."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
