"""The decoder family, one implementation: Llama 3, Mistral, Qwen 2 and 3, Gemma 2 and 3 (text).

Parameters are float32 unless loaded otherwise; matrix products and the residual stream have
`config.dtype`; norms, rotations, softmax and logits are float32 whatever it is.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from regjax.models import splash
from regjax.models.apply import Cache
from regjax.models.attention import attend, cached_mask, causal_mask, segment_positions
from regjax.models.cache import append, empty_cache, has_room, next_positions, require_unpacked
from regjax.models.config import DecoderConfig, RopeScaling
from regjax.models.rope import rope_angles, rope_frequencies, rotate

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

# Attention, a function of queries, keys and values, and rotation, two of `[B, L, 1, head_dim / 2]`, of
# one kind of layer.
Attend = Callable[[Array, Array, Array], Array]
Rotation = tuple[Array, Array]
Sight = tuple[Attend, Rotation]

# Of a layer, what is cheap to keep for what it costs to compute again.
KEEP_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(splash.RESIDUALS),
)

# Rotated keys and values, each `[B, L, K, C]`; of all layers, `[N, B, L, K, C]`.
KeysValues = tuple[Array, Array]


def _initializer(config: DecoderConfig) -> nnx.Initializer:
    return nnx.initializers.truncated_normal(config.initializer_scale)


def _linear(
    config: DecoderConfig, inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        kernel_init=_initializer(config),
        rngs=rngs,
    )


class Norm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale` over the last axis, or `* (1 + scale)`."""

    def __init__(self, config: DecoderConfig, size: int):
        self.epsilon = config.norm_epsilon
        self.offset = 1.0 if config.norm_scale_plus_one else 0.0
        self.scale = nnx.Param(jnp.full((size,), 1.0 - self.offset, jnp.float32))

    def __call__(self, inputs: Array) -> Array:
        x = inputs.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return (x * scale).astype(inputs.dtype)


class Embedding(nnx.Module):
    """Rows of a `[V, D]` table, in the compute type."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        shape = (config.vocabulary_size, config.width)
        self.table = nnx.Param(_initializer(config)(rngs.params(), shape, jnp.float32))
        self.dtype = jnp.dtype(config.dtype)
        self.factor = config.width**0.5 if config.scale_embeddings else None

    def __call__(self, tokens: Array) -> Array:
        rows = self.table[...][tokens].astype(self.dtype)
        # Published Gemma models were trained with the factor rounded to the compute type.
        return rows if self.factor is None else rows * jnp.asarray(self.factor, self.dtype)


class Head(nnx.Module):
    """Float32 logits `[..., V]` of hidden states `[..., D]`, by its own kernel or a tied table."""

    def __init__(self, config: DecoderConfig, table: nnx.Param | None, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.soft_cap = config.logit_soft_cap
        self.tied = table is not None
        if table is not None:
            self.table = table
        else:
            shape = (config.width, config.vocabulary_size)
            self.kernel = nnx.Param(_initializer(config)(rngs.params(), shape, jnp.float32))

    def projection(self) -> tuple[Array, float | None]:
        """The kernel `[D, V]`, in the compute type, and the soft cap."""
        kernel = self.table[...].T if self.tied else self.kernel[...]
        return kernel.astype(self.dtype), self.soft_cap

    def __call__(self, hidden: Array) -> Array:
        kernel, _ = self.projection()
        logits = jnp.matmul(hidden.astype(self.dtype), kernel, preferred_element_type=jnp.float32)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, to the keys of `past` and to the inputs' own.

    Returns the inputs' keys and values too.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        width, size, bias = config.width, config.head_dim, config.attention_bias
        self.query = _linear(config, width, config.heads * size, bias, rngs)
        self.key = _linear(config, width, config.key_value_heads * size, bias, rngs)
        self.value = _linear(config, width, config.key_value_heads * size, bias, rngs)
        self.output = _linear(
            config, config.heads * size, width, config.attention_output_bias, rngs
        )
        if config.query_key_norm:
            self.query_norm = Norm(config, size)
            self.key_norm = Norm(config, size)

    def __call__(
        self, inputs: Array, sight: Sight, past: KeysValues | None = None
    ) -> tuple[Array, KeysValues]:
        config, (attend, angles) = self.config, sight
        heads_of_size = (*inputs.shape[:-1], -1, config.head_dim)
        query = self.query(inputs).reshape(heads_of_size)
        key = self.key(inputs).reshape(heads_of_size)
        value = self.value(inputs).reshape(heads_of_size)
        if config.query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, *angles), rotate(key, *angles)
        keys, values = key, value
        if past is not None:
            keys = jnp.concatenate([past[0], key], axis=1)
            values = jnp.concatenate([past[1], value], axis=1)
        mixed = attend(query, keys, values)
        return self.output(mixed.reshape(*inputs.shape[:-1], -1)), (key, value)


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        self.gate = _linear(config, config.width, config.mlp_width, config.mlp_bias, rngs)
        self.up = _linear(config, config.width, config.mlp_width, config.mlp_bias, rngs)
        self.down = _linear(config, config.mlp_width, config.width, config.mlp_bias, rngs)

    def __call__(self, inputs: Array) -> Array:
        return self.down(ACTIVATIONS[self.activation](self.gate(inputs)) * self.up(inputs))


class Layer(nnx.Module):
    """Attention, then MLP, each normed before (and, for Gemma, after) and added to its input."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.post_norms = config.post_norms
        self.attention_norm = Norm(config, config.width)
        self.attention = Attention(config, rngs)
        self.mlp_norm = Norm(config, config.width)
        self.mlp = MLP(config, rngs)
        if config.post_norms:
            self.attention_post_norm = Norm(config, config.width)
            self.mlp_post_norm = Norm(config, config.width)

    def __call__(
        self, inputs: Array, sight: Sight, past: KeysValues | None = None
    ) -> tuple[Array, KeysValues]:
        attended, new = self.attention(self.attention_norm(inputs), sight, past)
        inputs = inputs + (self.attention_post_norm(attended) if self.post_norms else attended)
        changed = self.mlp(self.mlp_norm(inputs))
        return inputs + (self.mlp_post_norm(changed) if self.post_norms else changed), new


class Decoder(nnx.Module):
    """Tokens or embeddings `[B, L]` to hidden states `[B, L, D]`, and those to logits `[..., V]`.

    The layers are one `Layer` whose parameters have a leading axis `[N, ...]`.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs)
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers = nnx.vmap(lambda key: Layer(config, nnx.Rngs(key)))(keys)
        self.final_norm = Norm(config, config.width)
        tied_table = self.embedding.table if config.tied_embeddings else None
        self.head = Head(config, tied_table, rngs)

    def embed(self, tokens: Array) -> Array:
        """Embeddings `[..., D]` of `tokens [...]`, as the first layer takes them."""
        return self.embedding(tokens)

    def projection(self) -> tuple[Array, float | None]:
        """`(kernel [D, V], soft_cap)` of the head, see `ProjectingHead`."""
        return self.head.projection()

    def hidden(
        self,
        tokens: Array | None = None,
        *,
        embeddings: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array:
        """Final normed states `[B, L, D]` of `tokens [B, L]`, or of `embeddings [B, L, D]`.

        Args:
            tokens: int32 `[B, L]`.
            embeddings: in place of tokens; taken as `embed` returns them, so already scaled.
            positions: int32 `[B, L]`; by default the index within the segment.
            segment_ids: int32 `[B, L]`: 0 padding, on either side, 1.. the packed examples, each
                in one run. A token sees its own segment only. By default all ones.

        Raises:
            ValueError: both or neither of tokens and embeddings were given.
        """
        states, positions, segment_ids = self._rows(tokens, embeddings, positions, segment_ids)
        sights = self._sights(positions, functools.partial(self._over_rows, segment_ids))
        return self.final_norm(self._through_layers(states, sights)[0])

    def prefill(
        self,
        tokens: Array | None = None,
        *,
        room: int,
        embeddings: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, Cache]:
        """As `hidden`, and a cache of `L + room` columns, the first L of which hold the rows.

        Args:
            tokens: as `hidden` takes them, and so are `embeddings` and `positions`.
            room: how many tokens more the cache is for.
            segment_ids: int32 `[B, L]`: 0 padding, on either side, 1 the one example of the row.

        Raises:
            InputError: packed rows, where their values are known: not inside `jax.jit`.
            ValueError: as `hidden`.
        """
        if segment_ids is not None:
            require_unpacked(segment_ids)
        states, positions, segment_ids = self._rows(tokens, embeddings, positions, segment_ids)
        cache = empty_cache(self.config, states.shape[0], states.shape[1] + room)
        sights = self._sights(positions, functools.partial(self._over_rows, segment_ids))
        states, new = self._through_layers(states, sights, keep=True)
        return self.final_norm(states), append(cache, new, positions, segment_ids)

    def step(self, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        """Final normed states `[B, D]` of one token more in every row, and the cache with it.

        The token stands after the row's last one: its position is one more than the largest there,
        0 in a row of padding, its segment is 1. It is in the cache's next column, so that padding
        on the right of a row stays between its tokens and changes nothing.

        Args:
            tokens: int32 `[B]`.
            cache: of `prefill`, or of the step before.

        Raises:
            ValueError: the cache is full. Inside `jax.jit`, where that is not known, states are NaN.
        """
        fits = has_room(cache)
        positions = next_positions(cache)[:, None]

        def over_cache(window: int | None) -> Attend:
            return self._masked(
                cached_mask(positions, cache.positions, cache.segment_ids, window), "xla"
            )

        states = self.embed(jnp.asarray(tokens)[:, None]).astype(self.config.dtype)
        states, new = self._through_layers(
            states, self._sights(positions, over_cache), (cache.keys, cache.values), keep=True
        )
        states = jnp.where(fits, self.final_norm(states)[:, 0], jnp.nan)
        return states, append(cache, new, positions, jnp.ones_like(positions))

    def __call__(
        self,
        tokens: Array | None = None,
        *,
        embeddings: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array:
        """Float32 logits `[B, L, V]`: `head(hidden(...))`."""
        return self.head(
            self.hidden(tokens, embeddings=embeddings, positions=positions, segment_ids=segment_ids)
        )

    def _rows(
        self,
        tokens: Array | None,
        embeddings: Array | None,
        positions: Array | None,
        segment_ids: Array | None,
    ) -> tuple[Array, Array, Array]:
        """What the first layer takes `[B, L, D]`, positions and segment ids `[B, L]`."""
        if (tokens is None) == (embeddings is None):
            raise ValueError("give either tokens [B, L] or embeddings [B, L, D], not both")
        states = self.embed(jnp.asarray(tokens)) if embeddings is None else jnp.asarray(embeddings)
        states = states.astype(self.config.dtype)
        if segment_ids is None:
            segment_ids = jnp.ones(states.shape[:2], jnp.int32)
        if positions is None:
            positions = segment_positions(jnp.asarray(segment_ids))
        return states, jnp.asarray(positions), jnp.asarray(segment_ids)

    def _masked(self, mask: Array, implementation: Literal["xla", "cudnn"]) -> Attend:
        return functools.partial(
            attend,
            mask=mask,
            scale=self.config.score_scale,
            soft_cap=self.config.attention_soft_cap,
            implementation=implementation,
        )

    def _over_rows(self, segment_ids: Array, window: int | None) -> Attend:
        """Attention of each token of a row to those before it."""
        config = self.config
        if config.attention == "splash":
            return functools.partial(
                splash.attend,
                segment_ids=segment_ids,
                window=window,
                scale=config.score_scale,
                soft_cap=config.attention_soft_cap,
            )
        return self._masked(causal_mask(segment_ids, window), config.attention)

    def _sights(
        self, positions: Array, attend_within: Callable[[int | None], Attend]
    ) -> dict[str, Sight]:
        """The sight of each kind of layer."""
        config = self.config
        rotation = rope_angles(
            positions, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        )
        sights = {}
        if "global" in config.layer_kinds:
            sights["global"] = (attend_within(None), rotation)
        if "local" in config.layer_kinds:
            if config.local_rope_theta is not None:
                rotation = rope_angles(
                    positions,
                    rope_frequencies(config.head_dim, config.local_rope_theta, RopeScaling()),
                )
            sights["local"] = (attend_within(config.sliding_window), rotation)
        return sights

    def _through_layers(
        self,
        states: Array,
        sights: dict[str, Sight],
        past: KeysValues | None = None,
        *,
        keep: bool = False,
    ) -> tuple[Array, Any]:
        """States after the last layer and, with `keep`, the new keys and values of all layers."""
        config = self.config
        structure, stacked = nnx.split(self.layers)

        # A scan already keeps the compiler from merging the two computations of a layer.
        checkpoint = functools.partial(jax.checkpoint, prevent_cse=not config.scan_layers)

        def layer(
            states: Array, of_layer: tuple[nnx.State, KeysValues | None], sight: Sight
        ) -> tuple[Array, KeysValues | None]:
            attend, rotation = sight

            def through(
                states: Array, parameters: nnx.State, rotation: Rotation, past: KeysValues | None
            ) -> tuple[Array, KeysValues]:
                return nnx.merge(structure, parameters)(states, (attend, rotation), past)

            if config.rematerialisation == "full":
                through = checkpoint(through)
            elif config.rematerialisation == "dots":
                through = checkpoint(through, policy=KEEP_DOTS)
            states, new = through(states, of_layer[0], rotation, of_layer[1])
            return states, new if keep else None

        if not config.scan_layers:
            kept = []
            for index, kind in enumerate(config.layer_kinds):
                of_layer = jax.tree.map(lambda leaf, index=index: leaf[index], (stacked, past))
                states, new = layer(states, of_layer, sights[kind])
                kept.append(new)
            return states, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)

        if len(sights) == 1:
            (sight,) = sights.values()
            return jax.lax.scan(functools.partial(layer, sight=sight), states, (stacked, past))

        def alternating(states: Array, of_layer: tuple[Any, Any, Array]) -> tuple[Array, Any]:
            parameters, past, is_local = of_layer
            (near, near_rotation), (far, far_rotation) = sights["local"], sights["global"]
            rotation = jax.tree.map(
                functools.partial(jnp.where, is_local), near_rotation, far_rotation
            )
            sight = (lambda *heads: jax.lax.cond(is_local, near, far, *heads), rotation)
            return layer(states, (parameters, past), sight)

        is_local = jnp.array([kind == "local" for kind in config.layer_kinds])
        return jax.lax.scan(alternating, states, (stacked, past, is_local))


def create(config: DecoderConfig, seed: int | Array) -> Decoder:
    """A decoder with new float32 parameters, a function of `(config, seed)`.

    Kernels and embeddings are truncated normal of `config.initializer_scale`, biases zero, norms
    one. Large models are made in place by `jax.jit(lambda: split(create(config, 0))[1],
    out_shardings=...)()`.

    Args:
        config: of the model.
        seed: a number, traced or not, or a key of `jax.random.key`.
    """
    if not (isinstance(seed, Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)):
        seed = jax.random.key(seed)
    return Decoder(config, nnx.Rngs(seed))
