"""JAX's transformations, against the same function written with the dense matrix."""
# ruff: noqa: E731

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax.test_util import check_grads
from oracle import dense, transform

from jax_hadacore import _ffi, hadamard

# Neither orthonormal nor its own inverse, so that a rule that drops or squares it shows.
SCALE = 0.3
H = jnp.asarray(dense(8), jnp.float64) * SCALE
X = jnp.asarray(normal((2, 3, 8), np.float64))
ROW = X[0, 0]

f = functools.partial(hadamard, scale=SCALE)
close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


def g(x, axis=-1):
    """The function f by definition."""
    return jnp.moveaxis(jnp.tensordot(x, H, axes=([axis], [0])), -1, axis)


def nonlinear(transform):
    """A scalar function whose derivatives of every order involve the transform and its transpose."""
    weight = jnp.linspace(0.5, 2.0, 8)

    def loss(x):
        shaped = jax.lax.broadcast_in_dim(weight, x.shape, (x.ndim - 1,))
        return jnp.sum(shaped * jnp.sin(transform(jnp.tanh(x) * shaped)))

    return loss


def primitives(jaxpr):
    """The names of all primitives in a jaxpr, nested ones included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def moves(function, *args):
    """How often a function transposes an array, and how often it applies the transform."""
    names = list(primitives(jax.make_jaxpr(function)(*args).jaxpr))
    return names.count("transpose"), names.count("hadamard")


class TestJit:
    def test_value(self):
        close(jax.jit(f)(X), g(X))

    def test_inside_other_code(self):
        def model(transform, x):
            y = transform(jnp.exp(x)) - x
            return jnp.where(y > 0, y, transform(y) * 2)

        close(jax.jit(functools.partial(model, f))(X), model(g, X))

    def test_is_traced_once(self):
        traces = []

        @jax.jit
        def traced(x):
            traces.append(x)
            return hadamard(x, axis=1, scale=0.5) if x.shape[1] == 8 else f(x)

        for value in range(3):
            traced(X + value)
        assert len(traces) == 1

    @pytest.mark.usefixtures("fresh_lowering")
    def test_equal_eager_calls_are_lowered_once(self, monkeypatch, cpu_devices):
        lowered = []
        serves = _ffi.serves
        monkeypatch.setattr(_ffi, "serves", lambda *args, **kw: lowered.append(args) or serves(*args, **kw))
        x = jax.device_put(X, cpu_devices[0])
        for scale in (0.5, np.float32(0.5), np.float64(0.5)):
            hadamard(x, scale=scale)
        assert len(lowered) == 1

    def test_abstract_value(self):
        y = jax.eval_shape(f, jax.ShapeDtypeStruct((5, 8), jnp.bfloat16))
        assert (y.shape, y.dtype) == ((5, 8), jnp.bfloat16)


class TestVmap:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    @pytest.mark.parametrize("mapped", [0, 1, 2, 3, -1])
    def test_every_axis(self, mapped, axis):
        # The mapped axis and the transformed one in every order, the last position included.
        shape = [2, 3, 5]
        shape[axis] = 8
        x = jnp.asarray(normal((*shape, 4), np.float64))
        x = jnp.moveaxis(x, -1, mapped)
        y = jax.vmap(functools.partial(f, axis=axis), in_axes=mapped, out_axes=mapped)(x)
        close(y, jax.vmap(functools.partial(g, axis=axis), in_axes=mapped, out_axes=mapped)(x))

    @pytest.mark.parametrize("out", [0, 1, 2, -1])
    def test_out_axes(self, out):
        close(jax.vmap(f, in_axes=1, out_axes=out)(X), jax.vmap(g, in_axes=1, out_axes=out)(X))

    def test_nested(self):
        x = jnp.asarray(normal((4, 2, 8, 3), np.float64))
        nest = lambda t: jax.vmap(jax.vmap(t, in_axes=2, out_axes=1), in_axes=1, out_axes=2)
        close(nest(f)(x), nest(g)(x))

    def test_unmapped_operand(self):
        a = jnp.arange(3.0)
        both = lambda t: jax.vmap(lambda a, x: a * t(x), in_axes=(0, None))
        close(both(f)(a, ROW), both(g)(a, ROW))

    def test_derivatives(self):
        for derivative in (jax.grad, jax.hessian):
            close(jax.vmap(jax.vmap(derivative(nonlinear(f))))(X), jax.vmap(jax.vmap(derivative(nonlinear(g))))(X))
        close(jax.grad(lambda x: jnp.sum(jax.vmap(nonlinear(f), in_axes=1)(x)))(X), jax.grad(nonlinear(g))(X))

    def test_no_rows(self):
        assert jax.vmap(f)(jnp.zeros((0, 3, 8))).shape == (0, 3, 8)

    def test_spmd_axis_name(self):
        close(jax.vmap(f, axis_name="i", spmd_axis_name="i")(X), g(X))

    def test_named_axis(self):
        close(jax.vmap(lambda x: jax.lax.psum(f(x), "i"), axis_name="i", out_axes=None)(X), g(X.sum(0)))

    @pytest.mark.parametrize("mapped", [0, 1])
    def test_a_batch_axis_moves_nothing(self, mapped):
        assert moves(jax.vmap(f, in_axes=mapped, out_axes=mapped), X) == (0, 1)
        assert moves(jax.vmap(jax.vmap(f)), X) == (0, 1)

    def test_a_mapped_last_axis_moves_once(self):
        assert moves(jax.vmap(f, in_axes=2, out_axes=0), jnp.ones((3, 8, 4))) == (1, 1)

    def test_the_last_axis_moves_nothing(self):
        assert moves(f, X) == (0, 1)
        assert moves(functools.partial(hadamard, axis=2), X) == (0, 1)


class TestDerivatives:
    def test_grad(self):
        close(jax.grad(nonlinear(f))(X), jax.grad(nonlinear(g))(X))
        close(jax.jit(jax.grad(nonlinear(f)))(X), jax.grad(nonlinear(g))(X))

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_grad_over_any_axis(self, axis):
        x = jnp.moveaxis(X, -1, axis)
        loss = lambda t, x: jnp.sum(jnp.sin(t(x, axis=axis)))
        close(jax.grad(loss, argnums=1)(f, x), jax.grad(loss, argnums=1)(g, x))

    def test_value_and_grad(self):
        for ours, theirs in zip(jax.value_and_grad(nonlinear(f))(X), jax.value_and_grad(nonlinear(g))(X), strict=True):
            close(ours, theirs)

    def test_jvp(self):
        for ours, theirs in zip(jax.jvp(f, (X,), (X**2,)), jax.jvp(g, (X,), (X**2,)), strict=True):
            close(ours, theirs)

    def test_vjp_is_the_symmetric_matrix(self):
        _, pull = jax.vjp(f, ROW)
        close(jax.vmap(lambda ct: pull(ct)[0])(jnp.eye(8)), H)

    @pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
    def test_jacobian(self, jacobian):
        close(jacobian(f)(ROW), H)
        close(jacobian(f)(X[0]), jacobian(g)(X[0]))

    def test_hessian(self):
        close(jax.hessian(nonlinear(f))(ROW), jax.hessian(nonlinear(g))(ROW))

    @pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
    @pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
    def test_second_order_in_every_mode(self, outer, inner):
        close(outer(inner(nonlinear(f)))(ROW), jax.hessian(nonlinear(g))(ROW))

    def test_third_order(self):
        check_grads(nonlinear(f), (ROW,), order=3, modes=["fwd", "rev"])
        check_grads(f, (X,), order=2, modes=["fwd", "rev"])

    def test_linearize(self):
        y, push = jax.linearize(f, X)
        close(y, g(X))
        close(push(X**2), g(X**2))

    def test_linear_transpose(self):
        (y,) = jax.linear_transpose(f, X)(X**2)
        close(y, g(X**2))
        push = lambda x: jnp.sum(f(x) * X)
        (y,) = jax.linear_transpose(push, X)(jnp.float64(2))
        close(y, g(2 * X))

    def test_the_adjoint_identity(self):
        a, b = X, X**2 - 1
        (pulled,) = jax.linear_transpose(f, X)(b)
        close(jnp.vdot(f(a), b), jnp.vdot(a, pulled))

    def test_constant_operand_has_no_tangent(self):
        close(jax.grad(lambda a: jnp.sum(a * f(jax.lax.stop_gradient(X))))(2.0), jnp.sum(g(X)))

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
    def test_gradients_have_the_operand_type(self, dtype):
        x = X.astype(dtype)
        gradient = jax.grad(lambda x: jnp.sum(f(x).astype(jnp.float32)))(x)
        assert gradient.dtype == dtype
        expected = np.zeros(X.shape)
        expected[..., 0] = 8 * SCALE
        close(gradient.astype(jnp.float64), expected, rtol=0.01)


ROTATION = np.linalg.qr(normal((3, 3), np.float64))[0]
SIGNS = np.array([1, -1, -1, 1, -1, 1, 1, 1, -1, -1, 1, -1], np.int8)
OPTIONS = {
    "orders": {},
    "signs": {"signs": SIGNS},
    "signs-adjoint": {"signs": SIGNS, "transpose": True},
    "matrix": {"matrix": ROTATION},
    "matrix-adjoint": {"matrix": ROTATION, "transpose": True},
    "blocks": {"block_size": 4, "signs": SIGNS[:4]},
    "all": {"block_size": 6, "signs": SIGNS[:6], "matrix": ROTATION, "transpose": True},
}


CASES = [pytest.param(options, False, id=name) for name, options in OPTIONS.items()]
CASES += [pytest.param(options, True, id=f"{name}-traced") for name, options in OPTIONS.items() if "signs" in options]


@pytest.mark.parametrize(("options", "traced"), CASES)
class TestOptions:
    """Maps that are not symmetric, with signs that are constants of a program or among its arguments."""

    X = jnp.asarray(normal((2, 12), np.float64))

    @pytest.fixture
    def pair(self, options, traced):
        """The function, by the library and by its dense matrix, and a decorator for what takes the signs."""
        arguments = {"length" if name == "block_size" else name: value for name, value in options.items()}
        matrix = jnp.asarray(transform(np.eye(12), SCALE, **arguments), jnp.float64)
        rest = {name: value for name, value in options.items() if name != "signs"}
        signs = options.get("signs")

        def run(use, *args):
            """use(f, *args), where f knows the signs as an argument of the program where they are traced."""
            if not traced:
                return use(lambda x: hadamard(x, scale=SCALE, **options), *args)
            return jax.jit(lambda s, *args: use(lambda x: hadamard(x, scale=SCALE, signs=s, **rest), *args))(
                jnp.asarray(signs), *args
            )

        return run, lambda x: x @ matrix

    def agree(self, pair, use, *args, **tolerances):
        run, dense_map = pair
        jax.tree.map(functools.partial(close, **tolerances), run(use, *args), use(dense_map, *args))

    def test_first_order(self, pair):
        self.agree(pair, lambda t, x: t(x), self.X)
        self.agree(pair, lambda t, x: jax.jvp(t, (x,), (x**2,)), self.X)
        self.agree(pair, lambda t, x: jax.vjp(t, x)[1](x**2), self.X)
        self.agree(pair, lambda t, x: jax.linearize(t, x)[1](x**2), self.X)
        self.agree(pair, lambda t, x: jax.linear_transpose(t, x)(x**2), self.X)
        self.agree(pair, lambda t, x: jax.jacfwd(t)(x), self.X[0])
        self.agree(pair, lambda t, x: jax.jacrev(t)(x), self.X[0])

    def test_higher_orders(self, pair):
        loss = lambda t: lambda x: jnp.sum(jnp.sin(t(jnp.tanh(x))) * x)
        self.agree(pair, lambda t, x: jax.grad(loss(t))(x), self.X)
        self.agree(pair, lambda t, x: jax.hessian(loss(t))(x), self.X[0])
        self.agree(pair, lambda t, x: jax.jacrev(jax.jacfwd(loss(t)))(x), self.X[0])
        self.agree(pair, lambda t, x: jax.grad(lambda x: jnp.sum(jax.grad(loss(t))(x) ** 2))(x), self.X)

    def test_vmap(self, pair):
        loss = lambda t: lambda x: jnp.sum(jnp.sin(t(x)) * x)
        self.agree(pair, lambda t, x: jax.vmap(t)(x), self.X)
        self.agree(pair, lambda t, x: jax.vmap(t, in_axes=1, out_axes=1)(x), self.X.T)
        self.agree(pair, lambda t, x: jax.vmap(jax.grad(loss(t)))(x), self.X)

    def test_loops_and_remat(self, pair):
        step = lambda t: jax.checkpoint(lambda c, _: (jnp.sin(t(c)), None))
        self.agree(pair, lambda t, x: jax.lax.scan(step(t), x, None, length=3)[0], self.X)
        self.agree(
            pair, lambda t, x: jax.grad(lambda x: jnp.sum(jax.lax.scan(step(t), x, None, length=3)[0]))(x), self.X
        )


class TestTracedSigns:
    """What is done with signs that a transformation maps or differentiates."""

    X = jnp.asarray(normal((3, 12), np.float64))
    S = jnp.asarray([SIGNS, -SIGNS, SIGNS[::-1]], jnp.float64)

    @pytest.mark.parametrize("transpose", [False, True], ids=["map", "adjoint"])
    @pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None), (1, 1), (1, 0)], ids=str)
    def test_vmap(self, axes, transpose):
        mapped = {0: lambda a: a, 1: lambda a: a.T, None: lambda a: a[0]}
        x, s = (mapped[axis](each) for axis, each in zip(axes, (self.X, self.S), strict=True))
        rows = (
            each[:1].repeat(3, 0) if axis is None else each for axis, each in zip(axes, (self.X, self.S), strict=True)
        )
        call = lambda x, s: hadamard(x, signs=s, transpose=transpose)
        expected = [transform(x, signs=s, transpose=transpose) for x, s in zip(*rows, strict=True)]
        close(jax.vmap(call, in_axes=axes)(x, s), expected)
        close(jax.jit(jax.vmap(call, in_axes=axes))(x, s), expected)

    def test_nested_vmap_and_gradient(self):
        call = lambda x, s: jnp.sum(jnp.sin(hadamard(x, signs=s)))
        nested = jax.vmap(jax.vmap(jax.grad(call), in_axes=(0, None)), in_axes=(None, 0))
        expected = [
            [transform(np.cos(transform(x, signs=s)), signs=s, transpose=True) for x in np.asarray(self.X)]
            for s in np.asarray(self.S)
        ]
        close(nested(self.X, self.S), expected)

    def test_no_gradient_in_signs(self):
        for call in (hadamard, jax.jit(hadamard)):
            loss = lambda s, x, call=call: jnp.sum(jnp.sin(call(x, signs=s)) * x)
            close(jax.grad(loss)(self.S[0], self.X), 0)
            close(jax.jvp(functools.partial(loss, x=self.X), (self.S[0],), (self.S[1],))[1], 0)
            both = jax.grad(loss, argnums=(0, 1))(self.S[0], self.X)
            close(both[0], 0)
            assert jnp.all(both[1] != 0)

    def test_signs_of_a_loop(self):
        # Each step has signs of its own, as the layers of a model have.
        y, _ = jax.lax.scan(lambda c, s: (hadamard(c, signs=s), None), self.X, self.S)
        expected = np.asarray(self.X)
        for s in np.asarray(self.S):
            expected = transform(expected, signs=s)
        close(y, expected)

    def test_one_program_for_all_signs(self):
        call = jax.jit(lambda x, s: hadamard(x, signs=s))
        for s in self.S:
            call(self.X, s)
        assert call._cache_size() == 1


class TestComplex:
    Z = jax.lax.complex(X, X[::-1] ** 2)

    def test_holomorphic_gradient(self):
        loss = lambda t: lambda z: jnp.sum(jnp.sin(t(z)) * z)
        complex_g = lambda z: z @ H.astype(jnp.complex128)
        close(jax.grad(loss(f), holomorphic=True)(self.Z), jax.grad(loss(complex_g), holomorphic=True)(self.Z))

    def test_gradient_of_a_real_loss(self):
        loss = lambda t: lambda z: jnp.sum(jnp.abs(t(z)) ** 3)
        complex_g = lambda z: z @ H.astype(jnp.complex128)
        close(jax.grad(loss(f))(self.Z), jax.grad(loss(complex_g))(self.Z))

    def test_vmap_and_linear_transpose(self):
        close(jax.vmap(f, in_axes=1, out_axes=1)(self.Z), self.Z @ H.astype(jnp.complex128))
        (y,) = jax.linear_transpose(f, self.Z)(self.Z)
        close(y, self.Z @ H.astype(jnp.complex128))


class TestControlFlow:
    def test_scan(self):
        step = lambda t: lambda c, x: (t(c) + x, jnp.sum(t(x)))
        ours, theirs = (jax.lax.scan(step(t), X[0], jnp.stack([X[0], X[1]] * 3)) for t in (f, g))
        jax.tree.map(close, ours, theirs)

    @pytest.mark.parametrize("transform", [jax.grad, jax.hessian])
    def test_derivatives_of_scan(self, transform):
        def loss(t):
            return lambda c: jnp.sum(jax.lax.scan(lambda c, _: (jnp.tanh(t(c)), None), c, None, length=4)[0] ** 2)

        close(transform(loss(f))(ROW), transform(loss(g))(ROW))

    @pytest.mark.parametrize("taken", [True, False])
    def test_cond(self, taken):
        branch = lambda t: lambda p, x: jax.lax.cond(p, t, jnp.sin, x)
        close(jax.jit(branch(f))(taken, X), branch(g)(taken, X))
        close(
            jax.grad(lambda x: jnp.sum(branch(f)(taken, x) ** 2))(X),
            jax.grad(lambda x: jnp.sum(branch(g)(taken, x) ** 2))(X),
        )

    def test_cond_under_vmap(self):
        choose = lambda t: jax.vmap(lambda p, x: jax.lax.cond(p, t, jnp.sin, x))
        p = jnp.array([True, False])
        close(choose(f)(p, X), choose(g)(p, X))

    def test_fori_and_while(self):
        close(jax.lax.fori_loop(0, 3, lambda _, x: f(x), X), g(g(g(X))))
        grow = lambda t: jax.lax.while_loop(lambda x: jnp.max(jnp.abs(x)) < 100, lambda x: 3 * t(x), X)
        close(grow(f), grow(g))

    def test_map(self):
        close(jax.lax.map(f, X), g(X))
        close(jax.lax.map(f, jnp.stack([ROW] * 5), batch_size=2), jnp.stack([g(ROW)] * 5))

    @pytest.mark.parametrize(
        "policy", [None, "dots_saveable", "everything_saveable", "nothing_saveable"], ids=lambda p: p or "default"
    )
    def test_remat(self, policy):
        policy = policy and getattr(jax.checkpoint_policies, policy)
        wrap = lambda t: jax.checkpoint(lambda x: nonlinear(t)(t(jnp.sin(x))), policy=policy)
        close(jax.jit(jax.grad(wrap(f)))(X), jax.grad(wrap(g))(X))

    def test_remat_in_scan(self):
        def loss(t):
            step = jax.checkpoint(lambda c, _: (jnp.sin(t(c)), None))
            return lambda c: jnp.sum(jax.lax.scan(step, c, None, length=3)[0])

        close(jax.grad(loss(f))(X), jax.grad(loss(g))(X))

    def test_custom_vjp(self):
        @jax.custom_vjp
        def straight_through(x):
            return jnp.round(f(x))

        straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, ct: (f(ct),))
        close(jax.grad(lambda x: jnp.sum(straight_through(x) * X))(X), g(X))
