"""Model cards with a checkpoint's real numbers, and the push that writes them."""

from rarezoo.model_cards.card import build_card as build_card
from rarezoo.model_cards.card import write_card as write_card
from rarezoo.model_cards.publish import checkpoint_files as checkpoint_files
from rarezoo.model_cards.publish import push as push
