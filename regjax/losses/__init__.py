"""Losses as pure functions of arrays: one float32 number per example, never a mean.

`docs/losses.md` lists them by subject: formula, when to use it, source.
"""

from regjax.losses.adaptive_distillation import (
    adaptive_margin,
    adaptive_mixing,
    class_margins,
    margin_offsets,
    teacher_margins,
)
from regjax.losses.aggregate import aggregate_response
from regjax.losses.distillation import (
    decoupled_distillation,
    distillation,
    hard_distillation,
    labelled_distillation,
)
from regjax.losses.early_learning import early_learning, early_learning_targets
from regjax.losses.example_weights import (
    chi_square_weights,
    cvar_dual,
    cvar_weights,
    group_dro,
    kl_weights,
)
from regjax.losses.feature_distillation import patient_features, pearson_features
from regjax.losses.grid import expected_score, grid_log_probs, grid_mass
from regjax.losses.label_distribution import adaptive_temperature, label_distributionally_robust
from regjax.losses.linear import (
    linear_cross_entropy,
    linear_cross_entropy_and_hits,
    linear_expected_score,
    linear_grid_log_probs,
)
from regjax.losses.linear_teachers import linear_distillation, linear_top_k_distillation
from regjax.losses.long_tail import (
    class_balanced_weights,
    ldam,
    logit_adjusted,
    post_hoc_adjusted,
    softmax_focal,
    vector_scaling,
)
from regjax.losses.noise import anchor_noise_matrix, confident_noise_matrix
from regjax.losses.noise_robust import (
    active_passive,
    bootstrapping,
    generalized_cross_entropy,
    normalized_cross_entropy,
    reverse_cross_entropy,
    squentropy,
    symmetric_cross_entropy,
)
from regjax.losses.numeric import ordered_quantiles, pinball, relative_error
from regjax.losses.ordinal import coral, corn, earth_mover, exceedance, fidelity, thurstone
from regjax.losses.policy import (
    generalized_policy_gradient,
    group_normalized,
    leave_one_out,
    real,
    sampled_kl,
)
from regjax.losses.ranking import label_aggregation, loss_aggregation, pairwise_ranking
from regjax.losses.regression import expected_risk, number_token, raft
from regjax.losses.relational_distillation import correlation_distillation
from regjax.losses.sequence_distillation import (
    discounted_returns,
    on_policy_distillation,
    sequence_cross_entropy,
    sequence_distillation,
)
from regjax.losses.smoothing import (
    label_smearing,
    optimal_smoothing_rate,
    smearing_matrix,
    smearing_rate,
)
from regjax.losses.soft_labels import gaussian_levels, histogram_levels, soft_label_loss, two_hot
from regjax.losses.standardization import standardize_logits
from regjax.losses.tokens import token_cross_entropy
from regjax.losses.top_k_teacher import TopK, teacher_top_k, top_k_distillation
from regjax.losses.worst_case import (
    class_risk_sums,
    cost_weighted_distillation,
    exponentiated_gradient,
    post_shift,
    robust_costs,
)

__all__ = [
    "TopK",
    "active_passive",
    "adaptive_margin",
    "adaptive_mixing",
    "adaptive_temperature",
    "aggregate_response",
    "anchor_noise_matrix",
    "bootstrapping",
    "chi_square_weights",
    "class_balanced_weights",
    "class_margins",
    "class_risk_sums",
    "confident_noise_matrix",
    "coral",
    "corn",
    "correlation_distillation",
    "cost_weighted_distillation",
    "cvar_dual",
    "cvar_weights",
    "decoupled_distillation",
    "discounted_returns",
    "distillation",
    "early_learning",
    "early_learning_targets",
    "earth_mover",
    "exceedance",
    "expected_risk",
    "expected_score",
    "exponentiated_gradient",
    "fidelity",
    "gaussian_levels",
    "generalized_cross_entropy",
    "generalized_policy_gradient",
    "grid_log_probs",
    "grid_mass",
    "group_dro",
    "group_normalized",
    "hard_distillation",
    "histogram_levels",
    "kl_weights",
    "label_aggregation",
    "label_distributionally_robust",
    "label_smearing",
    "labelled_distillation",
    "ldam",
    "leave_one_out",
    "linear_cross_entropy",
    "linear_cross_entropy_and_hits",
    "linear_distillation",
    "linear_expected_score",
    "linear_grid_log_probs",
    "linear_top_k_distillation",
    "logit_adjusted",
    "loss_aggregation",
    "margin_offsets",
    "normalized_cross_entropy",
    "number_token",
    "on_policy_distillation",
    "optimal_smoothing_rate",
    "ordered_quantiles",
    "pairwise_ranking",
    "patient_features",
    "pearson_features",
    "pinball",
    "post_hoc_adjusted",
    "post_shift",
    "raft",
    "real",
    "relative_error",
    "reverse_cross_entropy",
    "robust_costs",
    "sampled_kl",
    "sequence_cross_entropy",
    "sequence_distillation",
    "smearing_matrix",
    "smearing_rate",
    "soft_label_loss",
    "softmax_focal",
    "squentropy",
    "standardize_logits",
    "symmetric_cross_entropy",
    "teacher_margins",
    "teacher_top_k",
    "thurstone",
    "token_cross_entropy",
    "top_k_distillation",
    "two_hot",
    "vector_scaling",
]
