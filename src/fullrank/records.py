"""The typed records that stages leave in the run folder: the joints between rooms.

Rooms never import one another, so what one writes and another reads is declared here, in the hallway. Every record is one
JSON file; its bulk (tokens, steps, predictions) lies beside it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fullrank.units import plural


class Record(BaseModel):
    """Base of every record: written once, read by name, strict about its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class StageRecord(Record):
    """What every stage says about itself."""

    fingerprint: str
    """SHA-256 over everything the stage's result depends on; a stage whose fingerprint still holds is not run again."""
    seconds: float
    """Wall time of the stage; of its last sitting, where it was stopped and continued."""
    peak_bytes: int
    """Peak resident memory of the process during the stage (device memory is in the stage's own fields)."""


# ---- the model ------------------------------------------------------------------------------------------------------


class ModelFacts(Record):
    """The base model as resolved."""

    source: str
    """As the recipe names it."""
    kind: Literal["embedded", "folder", "hub", "configuration"]
    """Where it is; `configuration` for sizes alone, without a model."""
    commit: str | None
    """Hub commit, or the digest of the embedded wheel."""
    fingerprint: str
    """SHA-256 over the names and digests of the folder's files."""
    architecture: str
    """Class name, such as LlamaForCausalLM."""
    parameters: int
    """Distinct parameters (tied ones once)."""
    dtype: str
    """Type of the stored weights."""
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary: int
    tied_embeddings: bool
    context_tokens: int | None
    """Longest context the configuration states."""


# ---- data -----------------------------------------------------------------------------------------------------------


class LengthSummary(Record):
    """Lengths in tokens over the examples of a split."""

    shortest: int
    median: int
    p95: int
    longest: int


class SourceCard(Record):
    """One source of a split: what was read and what became of it."""

    name: str
    """Path, glob or hub dataset, as the recipe has it."""
    read: int
    """Records found; read = used + quarantined."""
    used: int
    quarantined: int
    examples: int
    """Examples of the split that come from it, repetitions counted."""
    tokens: int
    weight: float | None
    """As the recipe has it."""
    examples_ratio: float
    """Realised share of the split's examples."""
    tokens_ratio: float
    """Realised share of the split's tokens."""


class SplitCard(Record):
    """One prepared split."""

    files: list[str]
    sources: list[SourceCard]
    read: int
    used: int
    quarantined: int
    examples: int
    tokens: int
    supervised_tokens: int
    supervised_ratio: float
    lengths: LengthSummary
    """Zeros where there is no example."""
    formats: dict[str, int]
    """Records by the form they came in: messages, prompt_completion, alpaca, sharegpt, text, preference, choices."""
    dropped_too_long: int
    """Examples left out as `too_long: drop` says."""
    truncated: int
    masked: dict[str, int]
    """Passages replaced by placeholders, by kind."""


class TestCard(Record):
    """One test set: kept as normalised records, since it is generated from, never trained on."""

    files: list[str]
    read: int
    quarantined: int
    examples: int
    longest_prompt_tokens: int


class TestItem(Record):
    """One line of `data/tests/<name>.jsonl`: a test record, normalised."""

    id: str
    """File and line of the record."""
    messages: list[dict[str, Any]] | None
    """The conversation before the answer; None for a plain prompt."""
    prompt: str | None
    """A plain prompt, for models without a chat template; None for a conversation."""
    tools: list[Any] | None
    reference: str
    """The answer to compare with."""
    choices: list[str] | None = None
    """What the answer is one of, where the record says so."""


class Place(Record):
    """Where a record stands."""

    path: str
    line: int
    """Line, or number of the record where its file has no lines; both from 1."""
    split: str
    """train, validation, or the name of a test set."""


Severity = Literal["error", "warning", "note"]


class Quarantined(Record):
    """One line of `data/quarantine.jsonl`: a record that was not used."""

    path: str
    line: int
    offset: int | None
    """Byte where the record begins in its file (decompressed, where it is compressed); None where there is no such place."""
    split: str
    reason: str
    asked_for: bool
    """Left out because the recipe says so (`too_long: drop`): it does not count against the budget."""
    loses_more: bool = False
    """It stands for an unknown number of records (the rest of a file that broke here): no budget covers it."""


class Finding(Record):
    """One thing the audit found."""

    kind: str
    """exact_duplicate, near_duplicate, leak, label_conflict, label_spelling, secret, personal_data, mojibake, ..."""
    severity: Severity
    """Errors stop a run unless the recipe accepts their kind by name."""
    what: str
    """What was found, in one line."""
    records: list[Place]
    count: int
    """Records concerned; more than are listed where the list had to end."""
    advice: str
    """What to do about it, in one sentence."""


class Audit(Record):
    """`data/audit.json`: what is wrong with the data, or looks so."""

    findings: list[Finding]
    """Errors first."""
    left_out: dict[str, str]
    """Checks that were not made, and why."""
    sampled: dict[str, str]
    """Checks that looked at a part only, and at which."""


class ShownToken(Record):
    """One token as `data show` and the report's data page print it."""

    id: int
    text: str
    supervised: bool
    control: bool


class ShownTurn(Record):
    """Consecutive tokens of one turn."""

    role: str
    """system, user, assistant, tool, ...; `document` for raw text, `template` for what belongs to no turn."""
    tokens: list[ShownToken]


class ShownExample(Record):
    """An example as the model sees it."""

    split: str
    example: int
    """Position in the split's store."""
    origin: str
    """File and line of the record."""
    tokens: int
    supervised_tokens: int
    turns: list[ShownTurn]
    cut: str
    """What was cut off, and where; empty for a whole example."""


class Term(Record):
    """How the tokenizer splits one term of the domain."""

    text: str
    """In its commonest spelling in the data; spellings that differ in case are one term."""
    words: int
    occurrences: int
    records: int
    """Records it occurs in."""
    pieces: list[str]
    """As it is split after a space, as most terms stand; the space is part of the first piece."""
    pieces_bare: list[str]
    """As it is split at the beginning of a line or after a bracket."""
    pieces_capital: list[str]
    """As it is split after a space with a capital initial."""
    broken: list[str]
    """Those of these pieces that are unknown to the vocabulary, a fallback to a byte, or no valid UTF-8 alone."""
    fertility: float
    """Tokens per word, over its occurrences as they stand."""
    saved_per_1000: float
    """Tokens saved for every 1,000 tokens of the data if it were one token: (pieces - 1) x occurrences / tokens."""
    rarity: float | None
    """Times as frequent here as in general text, at least; None for a term of a glossary and for several words."""


class TermsCard(Record):
    """`data/terms.json`: what the tokenizer does to the words of the domain."""

    glossary: str | None
    """The file the terms come from; None where they were mined."""
    measure: str
    """How terms were chosen, in one sentence."""
    records: int
    """Training records there are."""
    sampled: str
    """Which part of them was counted, in words; empty for all."""
    characters: int
    """Characters counted."""
    tokens: int
    """Tokens they are, as plain text without a chat template."""
    bytes_per_token: float
    """UTF-8 bytes per token; the more, the better the vocabulary fits."""
    fertility: float
    """Tokens per word (Rust et al. 2021, How Good is Your Tokenizer?); 1.0 where every word is one token."""
    split_words: float
    """Share of words that are several tokens: the proportion of continued words (Rust et al. 2021)."""
    answer_tokens: int
    answer_bytes_per_token: float
    answer_fertility: float
    """The same over answers alone; 0.0 where there are none."""
    ordinary_fertility: float
    """Tokens per word, over words of letters that are no terms."""
    term_fertility: float
    """Tokens per word, over all terms' occurrences."""
    terms: list[Term]
    """Those that would gain most from a place in the vocabulary, the best first."""
    found: int
    """All terms; more than are listed where the list had to end."""
    absent: list[str]
    """Terms of the glossary that do not occur, the first ones."""
    absent_count: int
    saved_by_10: float
    """Tokens saved for every 1,000 tokens if the 10 best terms were one token each; a word inside two terms is counted once."""
    saved_by_50: float
    saved_by_all: float


class DataCard(StageRecord):
    """What the model is trained, validated and tested on."""

    chat_template: Literal["model", "recipe", "none"]
    """Whose chat template rendered the examples."""
    training_fingerprint: str
    """SHA-256 over what training and validation examples depend on; test sets may change without it."""
    records_fingerprint: str
    """SHA-256 over what examples and test items depend on; the audit may change without it."""
    places: str = ""
    """SHA-256 over the names of the files: where they have moved, records are found in their new place."""
    stop_ids: list[int]
    """Tokens that end an answer, as the training examples end theirs."""
    train: SplitCard
    validation: SplitCard
    general: dict[str, SplitCard] = {}
    """What the task does not cover; never trained on."""
    tests: dict[str, TestCard]
    notes: list[str]
    """Words for the user: conversions, drops."""

    @property
    def stored(self) -> dict[str, SplitCard]:
        """What there are token stores of, as people call it."""
        named = {f"general: {name}": split for name, split in self.general.items()}
        return {"train": self.train, "validation": self.validation, **named}


# ---- plan -----------------------------------------------------------------------------------------------------------


class MachineFacts(Record):
    """The machine a plan is made for."""

    device: str
    """cpu, cuda or mps."""
    device_name: str
    cores: int
    threads: int
    """Threads torch computes with."""
    memory_bytes: int
    """Memory the device has in all (RAM for a CPU)."""
    memory_available_bytes: int
    """What the plan may use: the recipe's limit, or nine tenths of what is free."""
    disk_free_bytes: int


class LedgerLine(Record):
    """One part of the memory ledger."""

    part: str
    bytes: int
    formula: str


class Plan(StageRecord):
    """How a recipe is carried out on a machine; nothing here changes the mathematics of a step."""

    machine: MachineFacts
    model: ModelFacts
    trained_parameters: int
    precision: Literal["fp32", "bf16-mixed", "bf16-stochastic", "bf16-kahan", "bf16-nearest"]
    gradients: Literal["keep", "release", "spill"]
    """Where they wait for the update: in memory; nowhere, one block's at a time is alive; on disk or in host memory."""
    backward_passes: int
    """Through every block in a step: two where released gradients are clipped, one for their norm and one for the update."""
    optimizer_states: Literal["device", "host", "disk"]
    engine: Literal["single", "fsdp2", "deepspeed"]
    """What computes the steps: one process by itself, PyTorch FSDP2, or DeepSpeed ZeRO."""
    zero_stage: int | None = None
    """Of DeepSpeed: 1 divides optimizer states among ranks, 2 gradients too, 3 weights as well."""
    ranks: int
    """Processes that share the work, one a device."""
    replicas: int
    """Groups of them that hold the model once each."""
    context: int
    """Of them, that share each row."""
    offload_parameters: bool = False
    """Whether weights wait in host memory, a part with each rank."""
    sync: Literal["step", "row"]
    """When gradients are summed over ranks: once a step, until when each rank has them whole, or after every row."""
    examples: int
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    train_tokens: int
    """Tokens of the examples over all steps, without those that influence no loss."""
    shared_ratio: float
    """Share of them that are not computed, because examples of a row begin alike; over the first steps."""
    micro_batch_tokens: int
    """Most tokens one flat row holds."""
    recompute: Literal["none", "selective", "block", "offload"]
    """What of a block's activations is made again in the backward pass: nothing; all but products and attention; all; all, what
    is kept waiting in host memory or in a file."""
    ledger: list[LedgerLine]
    peak_bytes_predicted: int
    disk_bytes_predicted: int
    train_seconds_predicted: float
    seconds_basis: str
    """How the time was estimated."""
    fits: bool
    refusal: str
    """Empty when it fits; otherwise what does not, and the smallest change that would."""

    @property
    def where(self) -> str:
        """Devices and engine in words."""
        if self.engine == "single":
            return self.machine.device_name
        if self.engine == "deepspeed":
            return f"{plural(self.ranks, 'rank')} of {self.machine.device_name} (DeepSpeed ZeRO-{self.zero_stage})"
        held = f", which hold the model {self.replicas} times" if self.replicas > 1 else ""
        held += f", {self.context} sharing each row" if self.context > 1 else ""
        when = "after every row" if self.sync == "row" else "once a step"
        return f"{plural(self.ranks, 'rank')} of {self.machine.device_name} (FSDP2{held}; gradients summed {when})"

    @property
    def recomputed(self) -> str:
        """`recompute` in words."""
        again = "again in the backward pass"
        return {
            "none": "nothing recomputed",
            "selective": f"norms and products of elements computed {again}",
            "block": f"blocks computed {again}",
            "offload": f"blocks computed {again}, from inputs in {'host memory' if self.machine.device == 'cuda' else 'a file'}",
        }[self.recompute]

    @property
    def waiting(self) -> str:
        """`gradients`, `optimizer_states` and `offload_parameters` in words; empty where all is kept in memory."""
        place = "host memory" if self.machine.device == "cuda" else "a file"
        gradients = {
            "keep": "",
            "release": "gradients released block by block" + (", in two passes" if self.backward_passes == 2 else ""),
            "spill": f"gradients waiting in {place} for their norm",
        }[self.gradients]
        states = {"device": "", "host": "optimizer states in host memory", "disk": "optimizer states in a file"}[
            self.optimizer_states
        ]
        weights = "weights in host memory" if self.offload_parameters else ""
        return ", ".join(filter(None, (gradients, weights, states)))


# ---- simulation -----------------------------------------------------------------------------------------------------


class Cluster(Record):
    """Devices and what connects them, as a simulation assumes them; rates are of one device, those of links each way."""

    device: str
    device_type: Literal["cuda", "cpu"]
    source: str
    """Where these numbers come from, in words."""
    compute_type: Literal["bf16", "fp32"]
    """Of the products."""
    memory_bytes: int = Field(gt=0)
    flops_per_second: float = Field(gt=0.0)
    """Peak of products of the compute type."""
    reached_ratio: float = Field(gt=0.0, le=1.0)
    """Share of it that whole forward and backward passes reach."""
    memory_bytes_per_second: float = Field(gt=0.0)
    host_bytes_per_second: float = Field(gt=0.0)
    """Between a device and the memory beside it."""
    devices_per_node: int = Field(ge=1)
    node_bytes_per_second: float = Field(gt=0.0)
    """Link inside a node."""
    network_bytes_per_second: float = Field(gt=0.0)
    """Link between nodes."""
    link_ratio: float = Field(gt=0.0, le=1.0)
    """Share of a link's rate that collectives reach."""
    call_latency_seconds: float = Field(ge=0.0)
    """Of a collective, whatever its size."""
    node_latency_seconds: float = Field(ge=0.0)
    """Of a hop inside a node."""
    network_latency_seconds: float = Field(ge=0.0)
    """Of a hop between nodes."""
    overlap_ratio: float = Field(ge=0.0, le=1.0)
    """Share of the compute time during which links can work as well."""
    shares_node: bool
    """Whether what is said of a device is a node's, and its ranks share it (those of one CPU)."""
    price_per_hour: float | None = Field(default=None, ge=0.0)
    """Of a device, in any currency; None: no price is told."""


class SimulatedRow(Record):
    """A run on a number of devices. Seconds are of a step, and None where it does not fit."""

    devices: int
    scaling: Literal["strong", "weak"]
    """strong: the recipe's step, shared by more devices; weak: each has as much to do as one alone, so a step grows."""
    replicas: int
    """Groups of devices that hold the model once each."""
    global_batch_size: int
    steps: int
    """Of the run."""
    rows_per_device: int
    """In a step, at most."""
    row_tokens: int
    """Of the largest row."""
    busy_ratio: float
    """Share of the devices' compute time that goes to rows which count: the rest waits for longer rows, or has none."""
    recompute: Literal["none", "selective", "block", "offload"]
    sync: Literal["step", "row"]
    ledger: list[LedgerLine]
    peak_bytes: int
    available_bytes: int
    fits: bool
    compute_seconds: float | None
    communication_seconds: float | None
    """All of it, what is hidden behind compute included."""
    exposed_seconds: float | None
    """Communication that compute cannot hide."""
    update_seconds: float | None
    """Of the optimizer, and of moving what waits in host memory."""
    step_seconds: float | None
    """compute + exposed + update."""
    tokens_per_second: float | None
    efficiency_ratio: float | None
    """tokens_per_second of a device, beside that of the fewest devices that fit."""
    run_seconds: float | None
    """All steps; validation, checkpoints and evaluation left out. None where a step would hold more examples than all epochs."""
    price: float | None


class Simulation(Record):
    """`simulation.json`: memory, time and cost of a run on more and more devices, from stated assumptions; measured is only what
    `cluster.source` says so of."""

    model: ModelFacts
    trained_parameters: int
    precision: Literal["fp32", "bf16-mixed", "bf16-stochastic", "bf16-kahan", "bf16-nearest"]
    optimizer: str
    tokens_per_step: float
    """Of the recipe's steps, mean of those looked at."""
    steps_looked_at: int
    cluster: Cluster
    assumptions: list[str]
    """In words, beyond the cluster's numbers."""
    rows: list[SimulatedRow]
    """strong first, by devices."""
    notes: list[str]
    """What the rows show, in words."""


# ---- profile --------------------------------------------------------------------------------------------------------


class ModuleTime(Record):
    """One module of every block, or one beside the blocks, in a step."""

    module: str
    """Its name, `*` standing for the number of the block."""
    calls: int
    """Forward passes a step, those that recomputation repeats included."""
    forward_seconds: float
    """Of all of them, without the modules inside it, as all seconds here."""
    backward_seconds: float
    ratio: float
    """Share of the timed parts of the step."""
    flops_per_second: float | None
    """Of a linear module's three products: forward, and the gradients of input and weight."""


class MemoryPart(Record):
    """One part of the memory ledger, as planned and as found."""

    part: str
    planned_bytes: int
    measured_bytes: int | None
    """None where it cannot be told apart."""


class RankTime(Record):
    """What one of several ranks does in a step, mean."""

    rank: int
    computed_tokens: float
    computing_seconds: float
    communicating_seconds: float
    """A collective or a message is under way, or waited for (`fullrank.parallel.traffic`)."""
    exposed_seconds: float
    """Of those, during which this rank computes nothing."""


class Profile(Record):
    """`profile.json`: where the time and the memory of a step go."""

    device_name: str
    threads: int
    steps: int
    """That were timed, after the first."""
    first_step_seconds: float
    step_seconds: float
    """Median, as training itself runs."""
    steps_planned: int
    """Of the whole run."""
    examples_per_second: float
    tokens_per_second: float
    """Of the examples' tokens, shared ones counted for each."""
    phases: dict[str, float]
    """Seconds a step of data wait, forward, head, backward and optimizer, one after the other."""
    modules: list[ModuleTime]
    """The longest first."""
    needed_flops: int
    """Operations a step of the matrix products that it needs (`fullrank.models.flops`), mean."""
    best_flops_per_second: float
    """The fastest product of square matrices of the compute type, 1,024 to 4,096 wide (accelerators: to 8,192), measured here."""
    utilisation: float
    """needed_flops / mean seconds of a step / best_flops_per_second: model FLOPs utilisation (Chowdhery et al. 2022, PaLM,
    appendix B) against a measured ceiling."""
    rows_per_step: float
    row_tokens: int
    """Median of the rows."""
    separate_tokens: int
    """Tokens of the timed steps' examples."""
    computed_tokens: int
    """Those that were computed."""
    padded_tokens: int
    """Those of the same steps as batches padded to their longest example."""
    predictions: int
    """Positions that had logits."""
    memory: list[MemoryPart]
    peak_bytes_planned: int
    peak_bytes: int
    """Of the process; of the device, where tensors live on an accelerator."""
    ranks: list[RankTime]
    """Of several; empty for one process. Seconds by phase and module are the first one's."""
    balance: float | None
    """Mean tokens of a rank over those of the rank with most, mean of the steps; None for one process."""
    advice: list[str]
    """What to change."""


# ---- training -------------------------------------------------------------------------------------------------------


class Proof(Record):
    """What was checked after training, so that the report may claim it."""

    trainable_tensors: int
    changed_tensors: int
    never_reached_tensors: list[str]
    """Unchanged because their gradient was zero in every step (an expert never routed to): listed, not an error."""
    unmoved_tensors: list[str]
    """Unchanged although they had gradients, because weights of 16 bits rounded their updates away: listed, an error in 32
    bits."""
    export_dtype: str
    export_keys_equal: bool
    """The export has the base model's tensor names and shapes."""
    export_changed_tensors: int
    """Stored tensors of the export that differ from the base's in the export's type: small updates vanish in 16 bits."""
    export_tensors: int
    export_logits_identical: bool | None
    """A fresh process that loads the export computes bitwise the logits of the trained weights after the same cast; None where no
    process of the training held all of these."""
    export_weights_identical: bool | None
    """Of weights that were divided among ranks: those that a fresh process loads are theirs, bit by bit, after the same cast."""
    export_probe_tokens: int
    """Tokens whose logits were compared."""
    ties_kept: bool
    tokenizer_travels: bool
    """The fresh process tokenizes the probe and has the chat template and the stop tokens as training had them."""

    @property
    def export_is_the_model(self) -> bool:
        """Whether what could be compared, logits or weights, was the same."""
        return self.export_logits_identical is not False and self.export_weights_identical is not False


class TrainCard(StageRecord):
    """What training did."""

    model: ModelFacts
    steps: int
    steps_planned: int
    stopped_early: bool
    best_step: int
    """The step whose weights were exported: the lowest validation loss."""
    examples_seen: int
    tokens_seen: int
    computed_tokens_seen: int
    """Tokens passed through the model: fewer where examples of a row begin alike."""
    supervised_tokens_seen: int
    validation_loss_before: float
    validation_loss_best: float
    validation_loss_last: float
    loop_seconds: float
    """Wall time of the steps and validations, over all sittings of a resumed run."""
    tokens_per_second: float
    """Tokens trained over the seconds of the optimizer steps alone."""
    packed: bool
    """Examples share flat rows (the self-test passed); otherwise one example a row."""
    shared: bool
    """What examples of a row begin with alike is computed once."""
    layout_note: str
    """Why examples do not share rows or beginnings; empty where they do."""
    device_peak_bytes: int | None
    resumed_from_steps: list[int]
    proof: Proof


# ---- evaluation -----------------------------------------------------------------------------------------------------


class Score(Record):
    """A value with its 95 % interval over the test items."""

    value: float
    low: float
    high: float


class TestScores(Record):
    """Base and tuned model on one test set."""

    examples: int
    base: dict[str, Score]
    tuned: dict[str, Score]
    difference: dict[str, Score]
    """tuned - base over the same items."""
    p_value: dict[str, float]
    """Of each difference: how often chance would make one as large, by swapping the models' answers item by item."""
    stopped_ratio: dict[str, float]
    """Share of answers that ended by themselves, for base and tuned."""


class GroupScores(Record):
    """Questions of the general probe, or a group of them, under both models."""

    questions: int
    base: Score
    """Share whose right answer is the likeliest of four."""
    tuned: Score
    difference: Score
    """tuned - base, on the same items."""
    loss_difference: Score
    """Of the right answers, nats a token, tuned - base."""


class BlockDrift(Record):
    """How far a part of the model has moved."""

    part: str
    """`embeddings`, `block 0`, ..., `head and norms`."""
    weights: float
    """2-norm of what was added to its weights over that of the base's."""
    states: float | None
    """1 - mean cosine similarity of what comes out of it, token by token, in both models; None where nothing does."""


class TextScores(Record):
    """Texts under both models."""

    texts: int
    tokens: int
    """Of these that count: drawn ones, or supervised ones."""
    kl: Score
    """Forward KL divergence of the tuned model's predictions from the base's on them, nats a token; an interval over texts."""
    loss_difference: Score
    """Of these tokens, nats a token, tuned - base."""


class Forgotten(Record):
    """What the tuned model no longer is or knows."""

    own_text: TextScores
    """What the base model wrote by itself."""
    general: dict[str, TextScores]
    """The recipe's general data, by name."""
    probe: dict[str, GroupScores]
    """By group of questions; `all` of them first."""
    drift: list[BlockDrift]
    """From the first block to the last."""


class EvaluationCard(StageRecord):
    """What the base and the tuned model score on the same items."""

    primary: str
    """The test set whose scores head the report: the first, or `validation` when there is none."""
    tests: dict[str, TestScores]
    max_new_tokens: int
    base_was_instructed: bool
    forgotten: Forgotten | None = None
    """None where the recipe leaves it out, or an older version evaluated."""
    signatures: dict[str, str] = Field(default_factory=dict)
    """How a library says it computed a score, by score."""


class ChoiceLikelihood(Record):
    """One of a record's choices, as a model sees it after the prompt."""

    text: str
    log_likelihood: float
    """Sum over its tokens, nats."""
    tokens: int


class Prediction(Record):
    """One line of `evaluate/predictions-<test>-<model>.jsonl`."""

    id: str
    """File name and line of the record."""
    prompt: str
    """The rendered prompt, control tokens included."""
    reference: str
    answer: str
    stopped: bool
    """The answer ended by an end-of-turn token, not by the length limit."""
    scores: dict[str, float]
    choices: list[ChoiceLikelihood] | None = None
    """Where a choice was scored; `answer` is the likeliest one, unless other tasks had an answer generated."""


# ---- steps ----------------------------------------------------------------------------------------------------------


class RankFacts(Record):
    """One of the ranks that trained."""

    host: str
    process: int
    local_rank: int
    device_name: str
    memory_bytes: int
    """Of its device, in all."""
    memory_free_bytes: int
    """Of its device, before training."""


class Ranks(Record):
    """`train/ranks.json`: who trained, by rank, in the last sitting."""

    ranks: list[RankFacts]


class Rehearsal(Record):
    """`train/layout.json`: how the steps are laid out once the worst of them has been tried, and what it took."""

    micro_batch_tokens: int
    recompute: Literal["none", "selective", "block", "offload"]
    sync: Literal["step", "row"]
    """When gradients are summed over ranks."""
    planned: str
    """Fingerprint of what the plan wanted: under another plan the worst is tried anew."""
    peak_bytes: int
    """Measured while the worst rows were tried."""
    save_seconds: float
    amendments: list[str]
    """What did not fit before this did; empty where the plan's layout fitted."""


class StepRow(Record):
    """One line of `train/steps.jsonl`: the facts of one optimizer step."""

    step: int
    epoch: float
    loss: float
    """Mean over the step's supervised tokens, nats."""
    learning_rate: float
    grad_norm: float
    """Global, before clipping."""
    examples: int
    tokens: int
    """Of the examples, before the last that carries loss: what follows influences nothing."""
    computed_tokens: int
    """Tokens passed through the model: fewer where examples of a row begin alike."""
    supervised_tokens: int
    seconds: float
    memory_bytes: int
    """Resident memory of the process after the step."""
    changed_ratio: float
    """Share of the trained weights that the step changed, in a sample of every tensor: rounding can leave them as they are."""
    validation_loss: float | None = Field(default=None)
    """Loss over the validation data after this step, where one was due (the base model's is in the card)."""
