"""One-line faults, each with the tests that must notice it.

A fault is what a tired colleague might write. Whoever changes a line that stands here changes it here, too: a line that
is not found, or more than once, is an error of ``test_mutants.py``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """``old`` in a module of the package becomes ``new``; ``tests`` are arguments of pytest, in the folder tests."""

    name: str
    module: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return self.name


FAULTS = [
    # --- data, references -------------------------------------------------------------------------------------------
    Fault("a shared layer is masked at its first BatchNorm only", "network/trace.py",
          "return (layer,) if self.shared(layer) else tuple(dict.fromkeys(norm or layer for norm in self.norms[layer]))",
          "return (layer,) if self.shared(layer) else (self.norms[layer][0] or layer,)",
          "network/test_trace.py network/test_fold.py test_masks.py"),
    Fault("a constant beside the images counts as one of them", "network/trace.py",
          "uses.of(inputs[0]) is None", "False", "network/test_branches.py -k see_nothing"),
    Fault("no look at what torch shows to nobody", "network/trace.py",
          "    strict = True", "    strict = False", "network/test_branches.py -k nobody"),
    Fault("values that are asked for go unnoticed", "network/signals.py",
          "            self.asked = True", "            pass", "network/test_branches.py -k branch"),
    Fault("the first whole batch is not looked at", "probe.py",
          "        if not self.structure.functions:\n            self._check_faults(signals, logits, f\"{len(images)} images\")",
          "        if False:\n            self._check_faults(signals, logits, f\"{len(images)} images\")",
          "network/test_branches.py -k branch"),
    # --- the table, the replica, the self-test ------------------------------------------------------------------------
    Fault("a bounded gate is a product", "network/signals.py",
          "        if first.gate == second.gate:", "        if first.gate == second.gate or first.gate == 2:",
          "network/test_signals.py"),
    Fault("the gate takes all of the relevance", "network/signals.py",
          "gate = other if second.gate > first.gate else one", "gate = one if second.gate > first.gate else other",
          "network/test_signals.py -k constant"),
    Fault("group norm is not in the table", "network/layers.py",
          "(nn.GroupNorm, *_timm(\"norm\", \"GroupNorm\", \"GroupNorm1\"))", "()", "lrp/test_passes.py"),
    Fault("the groups of group norm are ignored", "lrp/passes.py",
          "            groups = module.num_groups  # type: ignore[assignment]", "            groups = 1",
          "lrp/test_passes.py"),
    Fault("a layer norm's mean takes relevance", "network/layers.py",
          "over=\"last\", centred=True,", "over=\"last\", centred=False,", "lrp/test_passes.py"),
    Fault("the replica is never compared", "network/check.py",
          "    return all(_distance(a, b) <= most", "    return True or all(_distance(a, b) <= most",
          "lrp/test_balance.py"),
    Fault("the replica's tolerance is infinite", "network/check.py",
          "    allowed = [TOLERANCE.get(tensor.dtype, 0.0) for tensor in expected]",
          "    allowed = [torch.inf for tensor in expected]", "lrp/test_balance.py"),
    Fault("the self-test allows everything", "lrp/balance.py",
          "    allowed = TOLERANCE * abs(logit)", "    allowed = 1e9 + TOLERANCE * abs(logit)", "lrp/test_balance.py"),
    Fault("the self-test is made once and for all", "network/check.py",
          "    if known.get(what) == now:", "    if what in known:", "lrp/test_balance.py"),
    Fault("BatchNorm's variance without its epsilon", "network/fold.py",
          "scale = torch.rsqrt(norm.running_var + getattr(norm, \"eps\", 1e-5))",
          "scale = torch.rsqrt(norm.running_var)", "network/test_fold.py"),
    Fault("a merged norm forgets its mean", "network/fold.py",
          "    shift = -norm.running_mean * scale", "    shift = 0 * norm.running_mean", "network/test_fold.py"),
    Fault("samples lie where they always lie", "network/trace.py",
          "    return {name: dimension for name, dimension in dimensions.items() if dimension != 0}",
          "    return {}", "network/test_samples.py"),
    # --- rules ----------------------------------------------------------------------------------------------------------
    Fault("epsilon has the wrong sign", "lrp/rules.py",
          "return ratio.div_(ratio + self.epsilon).mul_(grad)", "return ratio.div_(ratio - self.epsilon).mul_(grad)",
          "lrp/test_rules.py -k zennit"),
    Fault("gamma favours negative weights", "lrp/rules.py",
          "lambda weight: weight.clamp(min=0).mul_(gamma).add_(weight), x, kept)",
          "lambda weight: weight.clamp(max=0).mul_(gamma).add_(weight), x, kept)", "lrp/test_rules.py -k zennit"),
    Fault("gamma's default is one for all layers", "lrp/rules.py",
          "return 0.05 if isinstance(module, LINEAR) else 0.25", "return 0.25", "lrp/test_rules.py"),
    Fault("z⁺ counts no negative inputs", "lrp/rules.py",
          "return lean(module, same, x.clamp(min=0), bias) + lean(module, other, x.clamp(max=0))",
          "return lean(module, same, x.clamp(min=0), bias)", "lrp/test_rules.py -k zennit"),
    Fault("αβ adds what β takes away", "lrp/rules.py",
          "((self.alpha, True), (-self.beta, False))", "((self.alpha, True), (self.beta, False))",
          "lrp/test_rules.py -k zennit"),
    Fault("w² is |w|", "lrp/rules.py",
          "module.weight**2, None if bias is None else bias**2)", "module.weight.abs(), None if bias is None else bias**2)",
          "lrp/test_rules.py -k zennit"),
    Fault("queries and keys get as much as values", "lrp/softmax.py",
          "        q, k, v = _scale_gradient(q, 0.25), _scale_gradient(k, 0.25), _scale_gradient(v, 0.5)\n        return",
          "        q, k, v = _scale_gradient(q, 0.5), _scale_gradient(k, 0.5), _scale_gradient(v, 0.5)\n        return",
          "lrp/test_softmax.py"),
    Fault("conservative propagation differentiates the weights", "lrp/softmax.py",
          "        with torch.no_grad():\n            weights = logits(", "        if True:\n            weights = logits(",
          "lrp/test_softmax.py"),
    Fault("softmax z⁺ forgets the constant term", "lrp/softmax.py",
          "        if ctx.rule.zero_params is None:", "        if False:", "lrp/test_softmax.py"),
    Fault("a product gives all of its relevance twice", "lrp/passes.py",
          "result.register_hook(lambda grad: grad / 2)", "result.register_hook(lambda grad: grad)",
          "network/test_signals.py lrp/test_passes.py"),
    # --- criteria ---------------------------------------------------------------------------------------------------------
    Fault("integrated gradients match calls with the wrong activations", "criteria.py",
          "starts[name][-1 - call]", "starts[name][call]", "test_criteria.py"),
    Fault("integrated gradients leave out the image itself", "criteria.py",
          "for step in range(1, self.steps + 1):", "for step in range(self.steps):", "test_criteria.py"),
    Fault("raw weights in place of merged ones", "criteria.py",
          "probe.weights(folded=self.folded)", "probe.weights(folded=False)", "test_criteria.py"),
    Fault("activation before the non-linearity", "criteria.py",
          "                if layer.activation is not None:", "                if False:", "test_criteria.py"),
    Fault("magnitudes of the sum over samples", "attribute.py",
          "value = value if asked.absolute == \"never\" else value.abs()", "value = value", "test_attribute.py"),
    Fault("the last batch is not counted", "attribute.py",
          "            samples += len(value)", "            samples = len(value)", "test_attribute.py -k batch"),
    # --- choosing, masking, measuring -----------------------------------------------------------------------------------
    Fault("the highest go first", "scores.py",
          "values if order == \"least\" else -values", "-values if order == \"least\" else values", "test_scores.py"),
    Fault("ties go to the later one", "scores.py",
          "queue = torch.argsort(key, stable=True)\n            if cost", "queue = torch.argsort(key.flip(0), stable=True).sub(len(key) - 1).abs()\n            if cost",
          "test_scores.py"),
    Fault("negative scores are divided by their cost", "scores.py",
          "torch.where(scores < 0, scores * price, scores / price)", "scores / price", "test_scores.py test_budget.py"),
    Fault("nothing is guarded", "scores.py",
          "[max(0, len(key) - number) :]] = True", "[len(key) :]] = True", "test_scores.py"),
    Fault("a mask of a NaN is a NaN", "masks.py",
          "output.masked_fill(off.reshape(-1, *[1] * (output.ndim - 2)) if filters else off, 0)",
          "output * ~(off.reshape(-1, *[1] * (output.ndim - 2)) if filters else off)", "test_masks.py"),
    Fault("a mask stays behind an error", "masks.py",
          "    finally:\n        for handle in handles:", "    finally:\n        for handle in handles[1:]:", "test_masks.py"),
    Fault("or is and", "masks.py",
          "return self._with(other, torch.logical_or)", "return self._with(other, torch.logical_and)", "test_verbs.py"),
    Fault("Top-PR wants more than it says", "evaluate.py", ">= ", "> ", "test_evaluate.py -k top_pr"),
    Fault("a basic interval in place of a percentile one", "statistics.py",
          "method=\"percentile\"", "method=\"basic\"", "test_statistics.py"),
    Fault("a budget is overdrawn by one step", "budget.py",
          "return self.left(mask) <= self.share", "return self.left(mask) <= self.share + 0.05", "test_budget.py"),
    # --- recovering, tuning -------------------------------------------------------------------------------------------------
    Fault("fine-tuning in evaluation mode", "recover.py",
          "        trained.train()\n", "        trained.eval()\n", "test_recover.py"),
    Fault("the same order in every epoch", "recover.py",
          "torch.manual_seed(seed + epoch)", "torch.manual_seed(seed)", "test_recover.py -k order"),
    Fault("distillation without T²", "recover.py",
          "return temperature**2 * F.kl_div(", "return F.kl_div(", "test_recover.py -k divergence"),
    Fault("frozen weights are trained", "recover.py",
          "[parameter for parameter in trained.parameters() if parameter.requires_grad]",
          "[parameter.requires_grad_() for parameter in trained.parameters()]", "test_recover.py -k frozen"),
    Fault("the learning rate starts at nothing", "recover.py",
          "    place = (step + 0.5) / steps", "    place = step / steps", "test_recover.py -k few_steps"),
    Fault("what is pruned comes back", "recover.py",
          "fixed = {name: torch.where(mask[name], values, lowest)", "fixed = {name: torch.where(mask[name], values, values)",
          "test_recover.py -k nested"),
    Fault("leaks ten times as large are let pass", "batches.py",
          "if found > SHARED * smaller", "if found > 10 * SHARED * smaller", "test_batches.py -k smaller_set"),
    Fault("leaks are counted against the larger set", "batches.py",
          "min(len(set(one)), len(set(other)))", "max(len(set(one)), len(set(other)))", "test_batches.py -k smaller_set"),
    Fault("labels are those before target_transform", "batches.py",
          "plain if transform is None else", "plain if True else", "test_batches.py -k labels_that_the_samples_have"),
    Fault("targets are believed", "batches.py",
          "if torch.equal(_read_labels(data, first.tolist()), labels[first]):", "if True:",
          "test_batches.py -k labels_that_the_samples_have"),
    Fault("a rate may come twice", "rates.py", "if after <= before:", "if after < before:", "test_rates.py -k none"),
    Fault("a float32 keeps its tail", "rates.py",
          "float(str(number) if isinstance(number, np.floating) else number)", "float(number)", "test_rates.py -k anything"),
    Fault("images may be NaN", "batches.py",
          "    if not bool(images.isfinite().all()):", "    if False:", "test_batches.py -k one_NaN"),
    # --- compaction ---------------------------------------------------------------------------------------------------------
    Fault("a frozen layer learns once it is compacted", "compaction/compact.py",
          "requires_grad=learns)", "requires_grad=True)", "test_recover.py -k compacted"),
    Fault("a misread structure is not noticed", "compaction/compact.py",
          "            if not same or not all(", "            if False and not all(", "compaction/test_compact.py -k misread"),
]  # fmt: skip
