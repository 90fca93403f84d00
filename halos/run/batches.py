"""Opens what the training batches of a run are taken from: a data set, a stream, or samples of its own policy."""

from datetime import date

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from halos.config.bind import LossSpec
from halos.config.schema import Config
from halos.data.dates import date_of, refuse_unwritten
from halos.run.batch_source import BatchSource, DatasetSource, PolicySource
from halos.run.stream_source import StreamSource


def open_batch_source(
    config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, max_length: int, day: date
) -> BatchSource:
    """Read and check the training and evaluation data; a scorer's chat template writes `day`. Raises UserError for data that
    cannot be used."""
    if config.online is not None:
        return PolicySource(config, loss, tokenizer, accelerator, max_length, day)
    refuse_unwritten(config.data.date, date_of(tokenizer))
    source = StreamSource if config.data.stream else DatasetSource
    return source(config, loss, tokenizer, accelerator, max_length)
