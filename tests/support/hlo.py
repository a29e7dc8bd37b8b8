"""Programs as compilers write them, cut down to what the tests of twotower_jax/planning look at."""


def ragged_product(groups: int, rows: int, inputs: int, outputs: int) -> str:
    """Sorted rows times a matrix for each group, (rows, inputs) → (rows, outputs), as libtpu 0.0.52 has it for v6e.

    It reads as a product of all rows with all groups, masked and summed over groups; that the loop leaves out what is
    masked stands in the fusion's settings alone.
    """
    given, matrices, out = f"bf16[{rows},{inputs}]", f"bf16[{groups},{inputs},{outputs}]", f"bf16[{rows},{outputs}]"
    every, mask = f"bf16[{groups},{rows},{outputs}]", f"pred[{groups},{rows}]"
    settings = (
        '{"convolution_algorithm_config":{"emitter":"EmitAllBatchInSublanes","is_ragged_dot":true,'
        f'"num_groups_in_ragged_dot":"{groups}"}},"mask_aggregator_config":{{"mask_dim_to_iteration_index":["1","2"],'
        '"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_GROUP_STARTS"}}'
    )
    window = f"window={{size={groups} stride={groups - 1} lhs_dilate={groups}}}"
    operands = f"(w: {matrices}, x: {given}, m: {mask})"
    return f"""
%repeated (x: {given}) -> bf16[{groups},{rows},{inputs}] {{
  %x = {given}{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %b = bf16[{groups},{rows},{inputs}]{{2,1,0:T(8,128)(2,1)}} broadcast(%x), dimensions={{1,2}}
}}

%masked {operands} -> {out} {{
  %m = {mask}{{1,0:T(8,128)(4,1)}} parameter(2)
  %x = {given}{{1,0:T(8,128)(2,1)}} parameter(1)
  %w = {matrices}{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %mine = pred[{groups},{rows},{outputs}]{{2,1,0:T(8,128)(4,1)}} broadcast(%m), dimensions={{0,1}}
  %all = bf16[{groups},{rows},{inputs}]{{2,1,0:T(8,128)(2,1)}} fusion(%x), kind=kLoop, calls=%repeated
  %c = {every}{{2,1,0:T(8,128)(2,1)}} convolution(%all, %w), {window}, dim_labels=0bf_0io->0bf
  %zero = bf16[]{{:T(256)}} constant(0)
  %zeros = {every}{{2,1,0:T(8,128)(2,1)}} broadcast(%zero), dimensions={{}}
  %own = {every}{{2,1,0:T(8,128)(2,1)}} select(%mine, %c, %zeros)
  ROOT %r = {out}{{1,0:T(8,128)(2,1)}} reduce(%own, %zero), dimensions={{0}}, to_apply=%add
}}

%fused {operands} -> {out} {{
  %w = {matrices}{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %x = {given}{{1,0:T(8,128)(2,1)}} parameter(1)
  %m = {mask}{{1,0:T(8,128)(4,1)}} parameter(2)
  ROOT %f = {out}{{1,0:T(8,128)(2,1)}} fusion(%w, %x, %m), kind=kOutput, calls=%masked, backend_config={settings}
}}

ENTRY %main {operands} -> {out} {{
  %w = {matrices}{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %x = {given}{{1,0:T(8,128)(2,1)}} parameter(1)
  %m = {mask}{{1,0:T(8,128)(4,1)}} parameter(2)
  ROOT %f = {out}{{1,0:T(8,128)(2,1)}} fusion(%w, %x, %m), kind=kCustom, calls=%fused, backend_config={settings}
}}
"""
