"""One model type of Hugging Face against ours: what it calls the shape and the tensors, in both directions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from megatron_ext.errors import RequestError
from megatron_ext.models import ModelConfig
from tools.conversion.families.rope import ROPE_FIELDS, read_rope, write_rope
from tools.conversion.rows import Rule

Config = dict[str, Any]


# fields of which transformers makes another model, or reads one from other files
_ELSEWHERE: Config = dict.fromkeys(("quantization_config", "transformers_weights", "per_layer_config"))


def _nothing(_: Any) -> Config:
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """How config.json and the tensors of one model type say what a ModelConfig and our parameters say.

    Attributes:
        model_type, architecture: as config.json names the family.
        fields: config.json's field -> ModelConfig's, of equal value.
        aliases: other names that config.json's fields may have, such as those that the published models were given.
        absent: what transformers takes config.json's fields to be where it lacks them.
        nullable: those of `fields` that may be null, which is as ModelConfig's own default.
        fixed: ModelConfig's fields that are alike in every model of the family.
        demanded: config.json's fields of which one value is understood. An absent one has it.
        rules: all tensors that a model of the family may have.
        rotary: theta and scaling of the rotation stand in config.json. partial: also which part of a head is turned.
        read_more: config.json -> further ModelConfig fields; raises RequestError for what is not supported.
        write_more: ModelConfig -> further fields of config.json.
        optional_prefix: of tensors' names, left out by folders that hold the model without its head.
        derived: ends of names of tensors that follow from config.json, which old folders store too.
    """

    model_type: str
    architecture: str
    fields: dict[str, str]
    rules: Sequence[Rule]
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    absent: Config = dataclasses.field(default_factory=dict)
    nullable: frozenset[str] = frozenset()
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    demanded: Config = dataclasses.field(default_factory=dict)
    rotary: bool = True
    partial: bool = False
    read_more: Callable[[Config], dict[str, Any]] = _nothing
    write_more: Callable[[ModelConfig], Config] = _nothing
    optional_prefix: str = "model."
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def read(self, config: Config) -> ModelConfig:
        """The shape that config.json describes. Raises RequestError naming what is missing or not supported."""
        for name, value in (_ELSEWHERE | self.demanded).items():
            if config.get(name, value) != value:
                raise self._unsupported(name, config[name], f"; {value!r} is")
        renamed = {self.aliases[name]: config[name] for name in config.keys() & self.aliases.keys()}
        config = self.absent | config | renamed
        for name in self.fields.keys() - self.nullable:
            if config.get(name, 0) is None:
                raise self._unsupported(name, None)
        values = {ours: config[theirs] for theirs, ours in self.fields.items() if config.get(theirs) is not None}
        tied = config["tie_word_embeddings"]
        if not isinstance(tied, bool):
            raise self._unsupported("tie_word_embeddings", tied)
        values["untie_embeddings_and_output_weights"] = not tied
        try:
            if self.rotary:
                values |= read_rope(config, self.partial)
            model = ModelConfig(**values | self.fixed | self.read_more(config))
        except RequestError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RequestError(f"config.json: does not describe a {self.model_type} model ({reason})") from error
        try:
            model.validate()
        except (RequestError, TypeError) as error:
            raise RequestError(f"config.json: {error}") from error
        return model

    def _unsupported(self, name: str, value: Any, remedy: str = "") -> RequestError:
        return RequestError(f"config.json: {name} {value!r} of a {self.model_type} model is not supported{remedy}")

    def write(self, model: ModelConfig) -> Config:
        """config.json of a model, readable by transformers 4 and 5. Raises RequestError where words are lacking."""
        resolved = model.resolved()
        config: Config = {"architectures": [self.architecture], "model_type": self.model_type}
        config |= {theirs: getattr(resolved, ours) for theirs, ours in self.fields.items()}
        config |= self.demanded | {"tie_word_embeddings": model.tied, "use_cache": True}
        if self.rotary:
            config |= write_rope(model, self.partial)
        config |= self.write_more(resolved)
        understood = dataclasses.asdict(self.read(config).resolved())
        for name, value in dataclasses.asdict(resolved).items():
            if understood[name] != value and not (name in ROPE_FIELDS and model.rope_scaling != "llama3"):
                raise RequestError(
                    f"a {self.model_type} model of Hugging Face cannot have {name} {value} (it would be "
                    f"{understood[name]})"
                )
        return config

    def update(self, config: Config, model: ModelConfig) -> Config:
        """`config` as it is, but for what is to be said otherwise of `model`."""
        before, after = self.write(self.read(config)), self.write(model)
        changed = {name: value for name, value in after.items() if before.get(name) != value}
        if not changed.keys().isdisjoint(("rope_theta", "rope_scaling", "partial_rotary_factor")):
            config = {name: value for name, value in config.items() if name != "rope_parameters"}
            changed |= write_rope(model, self.partial)
        return {name: value for name, value in config.items() if self.aliases.get(name) not in changed} | changed
