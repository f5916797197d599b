"""Rows of the matrix of faults that come while a run runs: numbers, steps, layouts, interruptions, files, processes."""

from fault_matrix import Row


def _of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"test_{file}.py::test_{name}" for name in names)


_SAME_RUN = _of("faults", "a_run_with_bad_batches_has_the_bits_of_the_run_without_them")
_EXTREMES = _of("faults", "a_step_of_extreme_numbers_is_taken_in_full_or_counted")
_PAIRS = _of("faults", "the_table_has_every_pair_of_settings")
_SKIPS = _of("optimize_loss", "a_run_with_bad_batches_equals_the_run_without_them")
_OVERFLOW = _of(
    "optimize_loss",
    "a_finite_gradient_whose_square_overflows_does_not_kill_a_slot",
    "an_update_that_overflows_is_skipped",
    "a_parameter_that_would_overflow_is_left_as_it_was",
)
_NORM = _of(
    "clipping",
    "global_norm_is_right_to_three_ulp_at_any_magnitude",
    "global_norm_of_many_sixteen_bit_leaves_is_that_of_their_float32_values",
    "a_clipped_norm_is_at_most_the_limit_up_to_rounding",
)
_MANY = _of(
    "faults",
    "the_norm_of_400_arrays_of_bfloat16_is_clipped_to_the_limit",
    "the_norm_of_1e8_numbers_is_right_to_a_millionth",
)
_ADAPTIVE = (
    *_of("clipping", "the_adaptive_deviation_keeps_its_digits_at_any_norm"),
    *_of("clipping", "a_norm_that_is_not_finite_leaves_the_averages_as_they_were"),
    *_of("faults", "the_adaptive_deviation_is_right_through_a_million_norms_from_1e_30_to_1e30"),
)
_ZERO_NORM = _of("clipping", "skip_zero_norm_keeps_the_limit_through_a_masked_batch")
_ONE_DEVICE = (
    *_of("axes", "a_bad_number_on_one_device_is_skipped_on_all", "an_overflow_in_one_device_s_slot_is_skipped_on_all"),
    *_of("axes", "replicas_of_pmap_stay_equal_when_one_has_a_bad_batch"),
    *_of("faults", "a_bad_batch_of_one_process_is_skipped_by_all"),
)
_FOREVER = _of("chain", "a_chain_accepts_a_nan_in_the_end")
_TYPES = _of("contract", "dtypes_stay", "types_stay_in_every_step")
_TRACES = (
    *_of("faults", "steps_after_the_first_are_neither_traced_nor_compiled"),
    *_of("contract", "four_steps_are_traced_once"),
    *_of("live_state", "whatever_parameters_are_given_as_is_neither_changed_nor_traced_twice"),
)
_LAYOUTS = _of(
    "layouts",
    "jit_has_the_bits_of_one_device",
    "shard_map_has_the_bits_of_one_device",
    "each_replica_of_pmap_has_the_bits_of_one_device",
)
_TWO_PROCESSES = _of("processes", "two_processes_of_four_devices_have_the_bits_of_one_of_eight")
_DISAGREE = _of("processes", "processes_that_disagree_are_told_how", "processes_that_agree_train")
_BLOCKS = _of("axes", "each_part_has_its_block_of_the_whole_array_s_noise")
_WHOLE_NORM = _of("axes", "a_clip_sees_the_norm_of_the_whole_arrays", "a_clip_that_sees_its_part_alone_is_an_error")
_PLACES = _of("axes", "every_array_stays_where_init_put_it")
_ONE_PASS = _of(
    "speed",
    "skipping_steps_that_are_not_finite_adds_no_pass",
    "no_setting_stores_an_array_of_a_parameters_size",
    "gradients_made_in_a_step_are_all_that_a_scan_stores",
)
_KILL = _of("crash", "a_run_that_is_killed_ends_as_the_uninterrupted_one")
_KILL_TWO = _of("crash", "two_processes_that_are_killed_end_as_the_uninterrupted_run")
_RESTORED = _of(
    "checkpoints",
    "a_restored_state_has_the_tree_types_and_bits_of_the_saved_one",
    "a_run_that_goes_on_from_a_checkpoint_ends_as_the_uninterrupted_one",
    "a_flax_train_state_with_the_transformation_goes_on_from_a_checkpoint",
)
_FULL_DISK = _of("async_writer", "a_full_disk_costs_summaries_and_not_the_run")
_SLOW_SINKS = _of(
    "async_writer",
    "async_writer_waits_neither_for_the_device_nor_for_its_sinks",
    "async_writer_counts_what_a_full_queue_does_not_take",
    "async_writer_goes_on_after_a_sink_that_raises_and_tells_at_the_end",
    "async_writer_closes_within_its_time_where_a_sink_hangs",
)
_NO_CODE = _of("faults", "no_module_can_run_what_a_setting_or_a_file_says")

# What several rows leave to others, and why.
_JAX_WAITS = (
    "how long processes wait for a dead one is jax.distributed's; the library has no barrier of its own in a step, and "
    "the README names the time-outs that make it some 15 s"
)
_OWN_KEYS = (
    "replicas under pmap cannot compare their keys without one more collective a step; the README makes one state and "
    "replicates it, and such replicas stay equal"
)
_NO_MANIFEST = "the library writes and reads no checkpoint files; Orbax, msgpack or npz do, and restore takes arrays"

RUNNING: list[Row] = [
    # ---- C: numbers
    Row(
        "C1",
        "NaN or infinity in the loss, in one element of the gradients, in all, in the model state",
        "nothing changes, to the bit, but nonfinite_steps, which counts one; under every pair of six optimizers, four "
        "dtypes, jit, scan, pmap and a mesh, two clips, noise on and off",
        (*_SAME_RUN, *_PAIRS, *_of("parity", "a_nonfinite_step_leaves_everything_but_its_count_as_it_was")),
    ),
    Row("C2", "a run with bad batches", "ends with the bits of the run without them", (*_SAME_RUN, *_SKIPS)),
    Row("C3", "NaN in the new model state alone", "skipped and counted", (*_SAME_RUN, *_SKIPS)),
    Row(
        "C4",
        "an update, a slot or a parameter that would overflow in the optimizer",
        "skipped and counted; no array of the state is ever not finite",
        (*_OVERFLOW, *_EXTREMES, *_of("axes", "an_overflow_in_one_device_s_slot_is_skipped_on_all")),
    ),
    Row(
        "C5",
        "finite gradients whose squares overflow or vanish",
        "the norm is right to 3 ulp and clipped to the limit",
        (*_NORM, *_EXTREMES, *_of("parity", "a_norm_whose_squares_overflow_is_clipped_to_the_limit")),
    ),
    Row(
        "C6",
        "gradients that are all zero",
        "no 0/0, not counted as bad; adaptive averages take the norm in as TF1 did, or leave it out (skip_zero_norm)",
        (*_EXTREMES, *_ZERO_NORM, *_of("parity", "a_limit_of_which_the_original_made_nan_is_a_limit")),
    ),
    Row(
        "C7",
        "bad steps one after the other, however many",
        "each is skipped and counted; none is ever applied, and none is an error: the count is there to be looked at",
        (*_FOREVER, *_of("summaries", "a_skipped_step_shows_what_was_wrong_and_is_counted")),
    ),
    Row("C8", "a bad batch on one replica, device or process", "skipped on all of them", (*_ONE_DEVICE, *_SAME_RUN)),
    Row(
        "C9",
        "hundreds of bfloat16 arrays, an array of 1e8 numbers",
        "the norm is right to 1e-6 and the limit is met",
        (*_MANY, *_NORM, *_of("chain", "a_chain_lets_bfloat16_gradients_through_a_clip")),
    ),
    Row(
        "C10",
        "norms from 1e-30 to 1e30, a million of them",
        "the adaptive deviation is that of float64 to 1e-3, every limit is finite",
        _ADAPTIVE,
    ),
    Row(
        "C11a",
        "16-bit parameters, whose dtype loses epsilon, averages and rates",
        "slots and rates are float32: steps follow those of float32 parameters",
        (
            *_of("optimizers", "sixteen_bit_parameters_follow_float32_ones_through_zero_gradients"),
            *_of("optimizers", "adam_slots_move_by_gradients_that_bfloat16_slots_would_lose"),
            *_of("chain", "a_chain_rounds_the_rate_to_the_gradients_dtype"),
        ),
    ),
    Row(
        "C11b",
        "an update below the spacing of a 16-bit parameter",
        "it is rounded away",
        why_not="what dtype parameters have is the caller's choice; float32 ones, cast in the loss, are master weights",
    ),
    Row(
        "C12",
        "parameters of one dtype and gradients of another, mixed trees",
        "types of state and updates stay",
        (*_TYPES, *_of("faults", "gradients_of_another_dtype_leave_the_state_s_types")),
    ),
    Row("C13", "denormal gradients", "the step of zero gradients; nothing is counted", _EXTREMES),
    Row(
        "C14",
        "x64",
        "float32 parameters stay float32, float64 ones are computed in float64",
        (
            *_TYPES,
            *_of("clipping", "global_norm_of_float64_keeps_its_digits"),
            *_of("parity", "optimize_loss_follows_the_recorded_float64_trajectory"),
            *_SAME_RUN,
        ),
    ),
    Row(
        "C15",
        "checking_leaks, debug_nans, strict promotion, no rank promotion, x64, no jit, no transfers",
        "the same numbers",
        (
            *_of("faults", "init_and_updates_are_the_same_under_every_switch_of_jax"),
            *_of("contract", "a_step_transfers_nothing_from_or_to_the_host"),
        ),
    ),
    Row(
        "C16",
        "a gradient through the update, of zero gradients too",
        "finite, and that of central differences",
        (
            *_of("contract", "the_gradient_through_two_steps_is_finite"),
            *_of("faults", "the_gradient_through_two_steps_is_that_of_differences"),
        ),
    ),
    Row(
        "C17",
        "one bad member of a vmap",
        "skipped alone",
        _of("faults", "a_bad_member_of_a_vmap_is_skipped_alone"),
    ),
    Row(
        "C18",
        "a scan, a loop, a fori_loop",
        "the same bits",
        (
            *_of("faults", "a_scan_a_loop_and_a_fori_loop_of_steps_have_the_same_bits"),
            *_of("contract", "a_scan_equals_a_loop"),
        ),
    ),
    Row(
        "C19",
        "a bad micro-batch under Optax's MultiSteps",
        "left out where MultiSteps is told to; else it keeps the NaN, and every step is skipped and counted",
        _of("faults", "a_bad_micro_batch_poisons_no_parameter"),
    ),
    Row(
        "C20",
        "a bit of the state that flips in memory",
        "no step looks for it; the checksums of two moments name the array",
        _of("restore", "every_one_of_ten_thousand_flipped_bits_is_noticed"),
    ),
    Row(
        "C21",
        "a spike after norms that are not finite",
        "no guard looks at a window of losses; the adaptive clip leaves such norms out, and its static limit holds "
        "from the first step on",
        (
            *_of("clipping", "a_norm_that_is_not_finite_leaves_the_averages_as_they_were"),
            *_of("clipping", "adaptive_clipping_fn_follows_the_formula"),
        ),
    ),
    # ---- D: steps, schedules, compilation
    Row(
        "D1a",
        "steps at 2**24 and at the end of int32",
        "decays are those of float64 to 5e-7 of the initial rate",
        (
            *_of("faults", "a_decay_is_right_at_steps_beyond_2_24_and_at_the_last"),
            *_of("decay", "a_staircase_is_exact_at_steps_that_float32_does_not_tell_apart"),
            *_of("decay", "a_decay_gives_the_recorded_rates_of_traced_steps"),
        ),
    ),
    Row(
        "D1b",
        "cosine_decay_restarts with growing periods, hundreds of thousands of steps on",
        "a restart comes at its very step, up to 2**24 first periods",
        _of("decay", "restarts_come_at_their_very_step_however_late"),
    ),
    Row(
        "D2",
        "the step after 2**31 - 1",
        "the counter stays there and training goes on",
        (
            *_of("optimize_loss", "a_large_step_counts_exactly_and_stays_at_the_largest"),
            *_of("faults", "steps_at_the_end_of_int32_count_to_the_last_and_stay"),
        ),
    ),
    Row(
        "D3",
        "a negative step",
        "ValueError at construction and by restore",
        (
            *_of("restore", "a_step_below_zero_is_refused"),
            *_of("bad_input", "a_bad_setting_is_an_error_at_construction"),
        ),
    ),
    Row(
        "D4",
        "many steps, from parameters and states of every kind",
        "one trace, one compilation; after a million steps memory, types and counts are exact",
        (*_TRACES, *_of("faults", "a_million_steps_keep_memory_types_and_counts")),
    ),
    Row(
        "D5",
        "an op that is built anew in each step",
        "a program for each",
        why_not="what jax.jit compiles belongs to one function; an op is built once, outside the loop",
    ),
    Row(
        "D6",
        "another rate in the middle of a run",
        "no new program",
        _of(
            "optimize_loss",
            "a_rate_put_into_the_state_is_used_without_a_recompilation",
            "vmap_over_rates_trains_them_all_in_one_program",
        ),
    ),
    Row("D7", "a schedule and skipped steps", "the step stays, and with it the rate", (*_SKIPS, *_SAME_RUN)),
    Row(
        "D8",
        "a step compiled ahead, given another type",
        "JAX's error, which names the argument",
        _of("live_state", "a_step_compiled_ahead_takes_the_arguments_of_update_and_names_one_of_another_type"),
    ),
    Row(
        "D9",
        "several ops on one state and step",
        "the step moves once",
        _of(
            "optimize_loss",
            "increment_global_step_false_leaves_the_step",
            "an_op_leaves_the_parameters_and_slots_of_another_as_they_are",
            "two_ops_train_a_gan_on_one_state",
        ),
    ),
    Row(
        "D10",
        "a compilation cache from another machine",
        "as JAX has it",
        why_not="the cache is JAX's, whose key has machine and versions; the library neither reads nor writes it",
    ),
    # ---- E: noise, keys, layouts
    Row(
        "E1",
        "noise under every layout, in one process or two",
        "the same bits",
        (*_LAYOUTS, *_TWO_PROCESSES, *_BLOCKS),
    ),
    Row("E2", "replicas of a pmap with keys of their own", "they drift apart", why_not=_OWN_KEYS),
    Row(
        "E3",
        "a parameter that comes, goes or is renamed",
        "the noise of the others stays",
        (
            *_of("noise", "a_draw_is_the_same_whatever_else_is_in_the_tree"),
            *_of("chain", "a_chain_changes_a_parameter_s_noise_when_another_comes"),
        ),
    ),
    Row(
        "E4",
        "a restart at some step",
        "the noise of that step, whatever the way there",
        (
            *_of("noise", "a_draw_hangs_on_the_step_and_not_on_the_way_there"),
            *_of("checkpoints", "a_run_that_goes_on_from_a_checkpoint_ends_as_the_uninterrupted_one"),
        ),
    ),
    Row(
        "E5a",
        "another setting of JAX's generators at the restart",
        "the same noise",
        _of("faults", "noise_hangs_on_no_setting_of_jax_s_generators"),
    ),
    Row(
        "E5b",
        'the same with noise_generator="threefry"',
        "other noise",
        why_not="that choice is for jax.random's own numbers, which hang on jax_threefry_partitionable",
    ),
    Row(
        "E6",
        "the distribution of noise",
        "a normal one cut at two deviations, by 1e7 draws and more",
        (
            *_of("noise_statistics", "the_moments_are_those_of_a_truncated_normal"),
            *_of("noise_statistics", "the_distribution_function_is_that_of_a_truncated_normal"),
            *_of("noise_statistics", "the_tails_are_those_of_a_truncated_normal"),
        ),
    ),
    Row(
        "E7",
        "equal gradients on 1, 2, 4, 8 devices, however arrays lie",
        "the same bits with reproducible=True",
        (*_LAYOUTS, *_of("clipping", "an_exact_norm_is_the_nearest_float32")),
    ),
    Row(
        "E8",
        "a whole training on other devices",
        "within a millionth; replicas to the bit",
        (
            *_of("axes", "jit_on_a_mesh_ends_within_a_millionth_of_one_device"),
            *_of("axes", "shard_map_takes_the_step_of_the_whole_batch"),
            *_of("optimize_loss", "pmap_with_an_axis_name_averages_and_keeps_replicas_equal"),
        ),
    ),
    Row(
        "E9",
        "a clip inside shard_map, on parts of arrays",
        "the norm is that of the whole, or it is an error",
        (*_WHOLE_NORM, *_of("axes", "a_wrong_layout_is_an_error", "the_norm_of_parts_is_right_at_any_magnitude")),
    ),
    Row(
        "E10a",
        "init on parameters over several devices",
        "slots lie as their parameters do, counters and statistics on every device",
        (*_PLACES, *_of("contract", "the_state_of_optimize_loss_stays_where_init_puts_it")),
    ),
    Row(
        "E10b",
        "init inside jit, on an Auto mesh",
        "slots on one device",
        why_not="no program sees shardings over an Auto mesh; the README says to call init as it is",
    ),
    Row(
        "E11",
        "counters on one device, parameters on a mesh",
        "init spreads them over the mesh",
        (*_PLACES, *_of("restore", "what_comes_back_lies_as_the_new_state_does")),
    ),
    Row(
        "E12",
        "an array that does not divide into the devices",
        "JAX's error where it is put there",
        why_not="jax.device_put refuses it before there is a state",
    ),
    Row(
        "E13a",
        "an Explicit mesh",
        "as an Auto one",
        (*_LAYOUTS, *_of("contract", "eight_devices_equal_one"), *_PLACES),
    ),
    Row(
        "E13b",
        "a state in pinned memory of the host",
        "JAX's error, since a step computes in the device's memory",
        why_not="offloading is a transfer before and after the step, which is the caller's to place",
    ),
    # ---- F: donation and interruption
    Row(
        "F1",
        "a state that was used before",
        "ValueError that explains it",
        _of("live_state", "a_state_used_twice_is_an_error_that_explains_it"),
    ),
    Row(
        "F2",
        "Ctrl-C at any moment",
        "a live state",
        _of(
            "live_state",
            "ctrl_c_in_a_loop_of_steps_leaves_a_live_state",
            "an_interrupt_after_a_step_comes_at_the_next_one_and_the_state_between_them_is_live",
        ),
    ),
    Row(
        "F3",
        "SIGTERM",
        "the process ends, as without the library",
        why_not="signal handlers belong to the program; a run that is killed goes on from its checkpoint (G1)",
    ),
    Row(
        "F4",
        "a step that fails while it runs",
        "the error says what became of the state",
        _of("live_state", "a_step_that_fails_while_it_runs_says_that_the_state_is_lost_and_how_to_keep_one"),
    ),
    Row(
        "F5",
        "an error while a step is traced",
        "the state is alive",
        _of("live_state", "an_error_while_tracing_leaves_the_state_alive"),
    ),
    Row(
        "F6",
        "a NumPy or dlpack view of the state that is held",
        "it keeps its numbers; JAX then copies instead of donating, and does not say so",
        _of("faults", "a_view_of_the_state_keeps_its_numbers_through_an_update"),
    ),
    Row(
        "F7",
        "memory of a step",
        "every array is written in place; none besides the gradients is stored",
        (
            *_of(
                "speed", "a_step_on_donated_gradients_stores_no_array_besides", "a_step_reads_and_writes_what_it_must"
            ),
            *_ONE_PASS,
            *_of("contract", "a_donated_state_is_gone_and_the_next_step_goes_on"),
        ),
    ),
    Row(
        "F8",
        "two threads that update one state",
        "one of them gets the error of F1",
        _of("faults", "of_two_threads_that_update_one_state_one_is_told"),
    ),
    # ---- G: crash, checkpoint, restore
    Row("G1", "kill -9 at any moment, in the midst of a save too", "ends as the run that nobody killed", _KILL),
    Row(
        "G2",
        "a restart on another number of devices",
        "the state comes back with the new shardings; noise and equal gradients have the same bits",
        (
            *_of("checkpoints", "a_sharded_state_comes_back_from_orbax_with_its_shardings_and_goes_on"),
            *_of("restore", "what_comes_back_lies_as_the_new_state_does"),
            *_LAYOUTS,
        ),
    ),
    Row("G3", "kill -9 of either of two processes", "both end, and the run goes on to the same bits", _KILL_TWO),
    Row(
        "G4",
        "a flipped bit in a checkpoint",
        "an error that names the array",
        _of(
            "restore",
            "a_flipped_bit_is_an_error_that_names_the_array",
            "every_one_of_ten_thousand_flipped_bits_is_noticed",
        ),
    ),
    Row(
        "G5",
        "a full disk or a lost folder during a save",
        "as the checkpoint library has it",
        why_not=_NO_MANIFEST,
    ),
    Row(
        "G6",
        "a restart with other settings or parameters",
        "every difference is told",
        _of(
            "restore",
            "what_does_not_fit_is_refused_with_every_difference",
            "a_stage_that_was_added_starts_fresh_and_one_that_was_taken_away_is_dropped",
        ),
    ),
    Row(
        "G7",
        "a checkpoint restored without its types, as dicts and lists",
        "restore puts it into a new state",
        _of("restore", "what_was_saved_comes_back_to_the_bit_from_any_container"),
    ),
    Row(
        "G8",
        "keys of another kind at the restart",
        "plain uint32 in every state",
        _of("chain", "a_chain_with_noise_has_a_state_that_numpy_cannot_hold"),
    ),
    Row(
        "G9",
        "names with '/', '.', '..', newlines, of 300 characters",
        "no two share a place",
        _of("bad_input", "parameters_of_one_name_are_a_value_error"),
    ),
    Row(
        "G10",
        "a checkpoint of an older version",
        "there is none",
        why_not="0.1.0 is the first version, and none is released",
    ),
    Row(
        "G11",
        "another rate or limit at the restart",
        "told, and allowed",
        _of("restore", "a_changed_setting_is_told_and_the_state_is_that_which_was_saved"),
    ),
    Row("G12", "Orbax, msgpack, Equinox, pickle, npz; a Flax TrainState", "round trips to the bit", _RESTORED),
    Row(
        "G13",
        "hash, deepcopy and pickle of an op and its state",
        "an op is hashed and copied, not pickled, since it holds functions; a state is plain arrays",
        (
            *_of("faults", "a_train_op_is_hashed_and_copied_and_its_state_pickled"),
            *_of("restore", "a_state_survives_pickle_unchanged"),
        ),
    ),
    Row(
        "G14",
        "a checkpoint restored on one device for a run on eight",
        "restore puts it where the new state's arrays lie",
        (
            *_of("restore", "what_comes_back_lies_as_the_new_state_does"),
            *_of("checkpoints", "a_sharded_state_comes_back_from_orbax_with_its_shardings_and_goes_on"),
        ),
    ),
    # ---- H: several processes
    Row("H1", "processes with other settings, functions, versions", "ValueError in all, with what each has", _DISAGREE),
    Row("H2", "processes with other parameters or seeds", "ValueError in all, with what each has", _DISAGREE),
    Row(
        "H3",
        "processes that drift apart later",
        "no step looks for it",
        why_not="a comparison in the step is a collective more; checksums of the state, compared now and then, tell it",
    ),
    Row(
        "H4",
        "processes with batches of other shapes",
        "JAX's error, or its wait",
        why_not="batches come anew with each step, and to compare them first would be a collective a step",
    ),
    Row("H5", "an exception in one process", "the others wait for their time-outs", why_not=_JAX_WAITS),
    Row(
        "H6",
        "a process that is killed, or hangs",
        "the others end by jax.distributed's time-outs, and the run goes on from its checkpoint",
        _KILL_TWO,
    ),
    Row("H7", "a coordinator that is not there", "jax.distributed's error", why_not=_JAX_WAITS),
    Row(
        "H8",
        "one process that asks for summaries",
        "they are outputs of all; process 0 alone writes, and writing needs no other",
        _of("async_writer", "only_process_0_writes"),
    ),
    Row("H9", "two processes of four devices", "the bits of one of eight with reproducible=True", _TWO_PROCESSES),
    # ---- J: summaries
    Row("J1", "a full disk under the writer", "training goes on; what is lost is counted, and told once", _FULL_DISK),
    Row("J2", "a sink that is slow, raises or hangs", "training goes on; what is lost is counted", _SLOW_SINKS),
    Row(
        "J3",
        "NaN, infinity, nothing, 16-bit numbers in summaries",
        "numbers are written as they are; what has no values is left out",
        (
            *_of("tensorboard", "write_summaries_writes_what_is_not_finite_as_it_is"),
            *_of("tensorboard", "write_summaries_leaves_out_a_histogram_without_values"),
            *_of("summaries", "a_histogram_leaves_out_what_is_not_finite", "a_histogram_of_nothing_is_empty"),
            *_of("async_writer", "an_event_file_writes_what_is_not_finite_as_it_is"),
        ),
    ),
    Row(
        "J4",
        "tags with '../', newlines, of 300 characters",
        "they are data in one file of the folder, and no part of a path",
        _of("faults", "summaries_of_hostile_names_stay_in_the_folder_of_the_log"),
    ),
    Row(
        "J5",
        "a run that goes on from before its last summaries",
        "purge_step replaces them",
        _of("async_writer", "a_run_that_is_resumed_replaces_what_came_after_its_checkpoint"),
    ),
    Row(
        "J6",
        "the cost of summaries",
        "no transfer, no wait, no pass over memory",
        (
            *_of("contract", "a_step_transfers_nothing_from_or_to_the_host"),
            *_of("speed", "summaries_of_every_norm_add_no_pass"),
            *_of("async_writer", "async_writer_waits_neither_for_the_device_nor_for_its_sinks"),
        ),
    ),
    # ---- K: security
    Row(
        "K1",
        "settings and checkpoints that are code",
        "refused; nothing is executed, imported or opened",
        (*_of("faults", "a_setting_that_is_code_is_refused_and_not_run"), *_NO_CODE),
    ),
    Row(
        "K2",
        "(a+)+$, a kilobyte of stars, 10,000 names",
        "matched without backtracking; no setting is a regular expression",
        (
            *_of("faults", "a_hostile_pattern_among_ten_thousand_names_ends"),
            *_of("multipliers", "a_pattern_of_many_stars_is_matched_in_a_moment"),
        ),
    ),
    Row(
        "K3",
        "names with control characters",
        "they train; errors and explain() show them escaped",
        _of(
            "faults",
            "parameters_of_hostile_names_train",
            "explain_has_a_line_for_each_hostile_name",
            "an_error_shows_no_control_character",
        ),
    ),
    Row("K4", "a manifest that lies about shapes and counts", "there is no manifest", why_not=_NO_MANIFEST),
    Row(
        "K5",
        "a checkpoint that somebody changed",
        "not told",
        why_not="checksums tell accidents; against intent, sign the files, as for any other data",
    ),
    Row(
        "K6",
        "importing the library",
        "no socket, no file written, no thread, no setting of JAX changed",
        (
            *_of("faults", "importing_it_opens_no_socket_writes_no_file_and_starts_no_thread"),
            *_of("bad_input", "building_makes_no_array_and_starts_no_backend"),
        ),
    ),
    Row(
        "K7a",
        "what the library depends on",
        "jax, numpy, optax and the standard library",
        _of(
            "public_api",
            "the_package_imports_jax_numpy_optax_and_the_standard_library_alone",
            "importing_optloss_imports_no_optional_package",
        ),
    ),
    Row(
        "K7b",
        "locked hashes, signed wheels, audits",
        "none yet",
        why_not="they belong to a release, and there is none",
    ),
    Row(
        "K8",
        "eval, exec, pickle, subprocess and the like in the package",
        "none",
        (*_NO_CODE, *_of("public_api", "nothing_runs_code_from_a_setting")),
    ),
    # ---- findings
    Row(
        "1",
        "Optax's clip lets bfloat16 gradients through",
        "norms are accumulated in float32",
        (*_of("chain", "a_chain_lets_bfloat16_gradients_through_a_clip"), *_MANY),
    ),
    Row(
        "2",
        "a finite gradient kills a parameter for ever",
        "the step is skipped and counted",
        (*_of("chain", "a_chain_kills_a_parameter_by_one_large_finite_gradient"), *_OVERFLOW, *_EXTREMES),
    ),
    Row(
        "3",
        "a finite gradient is thrown away unseen",
        "it is clipped to its direction",
        (*_of("chain", "a_chain_throws_a_large_finite_gradient_away"), *_EXTREMES),
    ),
    Row(
        "4",
        "one NaN or infinity in a clip leaves zeros that look good",
        "every update is NaN, and the step is skipped",
        (*_of("clipping", "a_norm_that_is_not_finite_makes_every_update_nan"), *_SAME_RUN),
    ),
    Row("5", "apply_if_finite accepts the NaN in the end", "never", (*_FOREVER, *_OVERFLOW, *_SAME_RUN)),
    Row(
        "6",
        "TF1's adaptive clip after a NaN, a zero, or by its rounding",
        "NaN is left out, zeros may be, averages are centred",
        (*_ADAPTIVE, *_ZERO_NORM, *_of("clipping", "adaptive_clipping_fn_follows_the_formula")),
    ),
    Row(
        "7",
        "guards against spikes that one NaN jams or disarms",
        "there is no such guard; norms that are not finite never enter the averages of the clip",
        _of("clipping", "a_norm_that_is_not_finite_leaves_the_averages_as_they_were"),
    ),
    Row(
        "8",
        "bad settings that Optax takes in silence or refuses without a name",
        "each is an error at construction or init that names the argument and shows what came",
        (
            *_of("fault_settings", "a_single_bad_setting_is_an_error_that_names_it_and_shows_what_came"),
            *_of("fault_settings", "there_are_more_bad_settings_than_the_82_of_which_a_chain_names_six"),
            *_of("chain", "a_chain_takes_nonsense_for_a_setting"),
        ),
    ),
    Row("9", "kill -9 and restart", "ends as the run that nobody killed", (*_KILL, *_KILL_TWO)),
    Row(
        "10",
        "checkpoints have no check of their content",
        "checksums",
        _of("restore", "every_one_of_ten_thousand_flipped_bits_is_noticed"),
    ),
    Row(
        "11",
        "Orbax loses parameters whose names fall together",
        "two parameters of one name are an error",
        _of("bad_input", "parameters_of_one_name_are_a_value_error"),
    ),
    Row(
        "12",
        "a changed optimizer takes the old one's slots in silence",
        "refused",
        _of("restore", "an_optimizer_with_slots_of_the_same_names_is_refused"),
    ),
    Row("13", "an exception in one process hangs the others for 308 s", "the same", why_not=_JAX_WAITS),
    Row("14", "processes that disagree train on", "init raises in all of them", _DISAGREE),
    Row(
        "15a",
        "noise and clips in shard_map that see their part alone",
        "the noise and the norm of the whole",
        (*_BLOCKS, *_WHOLE_NORM, *_of("axes", "noise_on_a_leaf_that_is_cut_wants_its_spec")),
    ),
    Row("15b", "replicas of a pmap with keys of their own", "they drift apart", why_not=_OWN_KEYS),
    Row("16", "the same bits under every sharding are within reach", "reproducible=True", (*_LAYOUTS, *_TWO_PROCESSES)),
    Row(
        "17",
        "donation: tied arrays, averages, used states, failures, Ctrl-C",
        "shared arrays are copied by init; the rest is F1 to F4",
        (
            *_of("live_state", "tied_arrays_become_two_parameters_and_both_learn"),
            *_of("live_state", "an_average_that_starts_as_the_parameters_stays_alive"),
            *_of("optimize_loss", "what_the_caller_gave_stays_alive", "a_step_donates_its_state"),
        ),
    ),
    Row("18", "a full disk hangs or kills the training", "it costs summaries", (*_FULL_DISK, *_SLOW_SINKS)),
    Row(
        "19",
        "programs compiled twice or thrice, or for minutes",
        "once; arrays of one shape share their kernels",
        (*_TRACES, *_of("speed", "arrays_of_one_shape_share_their_kernels")),
    ),
    Row("20", "what guards cost", "no pass over memory, no second state", _ONE_PASS),
]
