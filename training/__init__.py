"""Training of sparse retrievers: losses, collator, trainer with exact large batches, recipes."""

from rarezoo.training.chunked_encoding import encode_in_chunks as encode_in_chunks
from rarezoo.training.collator import RetrievalCollator as RetrievalCollator
from rarezoo.training.losses import active_dimensions as active_dimensions
from rarezoo.training.losses import flops_regularizer as flops_regularizer
from rarezoo.training.losses import info_nce_loss as info_nce_loss
from rarezoo.training.losses import kl_distillation_loss as kl_distillation_loss
from rarezoo.training.losses import l1_regularizer as l1_regularizer
from rarezoo.training.losses import margin_mse_loss as margin_mse_loss
from rarezoo.training.losses import quadratic_weight as quadratic_weight
from rarezoo.training.objective import SparseObjective as SparseObjective
