"""Training of retrievers, sparse and multi-vector, and of language models: losses, collators, trainers, recipes."""

from rarezoo.training.chunked_encoding import encode_in_chunks as encode_in_chunks
from rarezoo.training.collator import LateInteractionCollator as LateInteractionCollator
from rarezoo.training.collator import RetrievalCollator as RetrievalCollator
from rarezoo.training.data import read_text_table as read_text_table
from rarezoo.training.data import read_texts as read_texts
from rarezoo.training.data import read_training_rows as read_training_rows
from rarezoo.training.from_scratch import initialize_as_lexical_matcher as initialize_as_lexical_matcher
from rarezoo.training.from_scratch import train_tokenizer as train_tokenizer
from rarezoo.training.language_adapter import train_language as train_language
from rarezoo.training.language_model import LanguageModelTrainer as LanguageModelTrainer
from rarezoo.training.language_model import build_language_model as build_language_model
from rarezoo.training.language_model import lookup_ids as lookup_ids
from rarezoo.training.language_model import pack_texts as pack_texts
from rarezoo.training.late_interaction_from_scratch import (
    initialize_as_lexical_late_interaction as initialize_as_lexical_late_interaction,
)
from rarezoo.training.late_interaction_from_scratch import train_xlm_r_tokenizer as train_xlm_r_tokenizer
from rarezoo.training.late_interaction_losses import LateInteractionObjective as LateInteractionObjective
from rarezoo.training.late_interaction_losses import in_batch_cross_entropy_loss as in_batch_cross_entropy_loss
from rarezoo.training.late_interaction_losses import nway_cross_entropy_loss as nway_cross_entropy_loss
from rarezoo.training.late_interaction_losses import score_distillation_loss as score_distillation_loss
from rarezoo.training.losses import active_dimensions as active_dimensions
from rarezoo.training.losses import flops_regularizer as flops_regularizer
from rarezoo.training.losses import info_nce_loss as info_nce_loss
from rarezoo.training.losses import kl_distillation_loss as kl_distillation_loss
from rarezoo.training.losses import l1_regularizer as l1_regularizer
from rarezoo.training.losses import margin_mse_loss as margin_mse_loss
from rarezoo.training.losses import quadratic_weight as quadratic_weight
from rarezoo.training.objective import SparseObjective as SparseObjective
from rarezoo.training.recipe import LanguageModelRecipe as LanguageModelRecipe
from rarezoo.training.recipe import LateInteractionRecipe as LateInteractionRecipe
from rarezoo.training.recipe import SparseTrainingRecipe as SparseTrainingRecipe
from rarezoo.training.recipe import TrainingRecipe as TrainingRecipe
from rarezoo.training.recipe import TransplantTrainingRecipe as TransplantTrainingRecipe
from rarezoo.training.recipe import load_recipe as load_recipe
from rarezoo.training.run import build_from_preset as build_from_preset
from rarezoo.training.run import load_for_training as load_for_training
from rarezoo.training.run import train as train
from rarezoo.training.stabilization import stabilization_loss as stabilization_loss
from rarezoo.training.stabilization import stabilize as stabilize
from rarezoo.training.tokenizer_transplant import align_chunks as align_chunks
from rarezoo.training.tokenizer_transplant import alm_loss as alm_loss
from rarezoo.training.tokenizer_transplant import only_embeddings_train as only_embeddings_train
from rarezoo.training.trainer import CollapseCallback as CollapseCallback
from rarezoo.training.trainer import LateInteractionTrainer as LateInteractionTrainer
from rarezoo.training.trainer import SparseRetrievalTrainer as SparseRetrievalTrainer
