"""Rows of the matrix of faults: settings (A), and losses, batches and parameters (B)."""

from fault_matrix import Row

_BAD = "test_fault_settings.py::test_a_single_bad_setting_is_an_error_that_names_it_and_shows_what_came"
_RANDOM = "test_fault_settings.py::test_one_to_three_faults_among_random_settings_are_an_error_that_names_one_of_them"
_NUMBER = "test_fault_settings.py::test_a_number_of_another_type_trains_to_the_bits_of_the_one_that_is_meant"
_BAD_LOSS = "test_bad_input.py::test_a_loss_that_is_no_scalar_is_a_value_error"
_EXPLAIN = "test_explain.py::test_explain_warns_of_a_setting_that_cannot_do_what_it_says"


def _bad(*cases: str) -> tuple[str, ...]:
    return tuple(f"{_BAD}[{case}]" for case in cases)


SETTINGS = [
    # ---- A: settings
    Row("A1", "a learning rate that is a string", "ValueError at construction", _bad("learning_rate='0.1'")),
    Row("A2", "a negative learning rate", "ValueError at construction", _bad("learning_rate=-0.1")),
    Row(
        "A3",
        "a learning rate of NaN or infinity",
        "ValueError at construction",
        _bad("learning_rate=nan", "learning_rate=inf", "learning_rate=-inf"),
    ),
    Row("A4", "a learning rate of 1, an int", "trains as with 1.0, to the bit", (_NUMBER,)),
    Row("A5", "a learning rate of True", "ValueError at construction", _bad("learning_rate=True")),
    Row(
        "A6",
        "no learning rate for an optimizer that needs one",
        "ValueError at construction",
        (
            *_bad("learning_rate=None", "learning_rate=None, optimizer='adamw'"),
            "test_chain.py::test_a_chain_takes_nonsense_for_a_setting",
        ),
    ),
    Row(
        "A7",
        "no learning rate for a transformation, which has its own",
        "trains",
        (
            "test_fault_settings.py::test_without_a_rate_a_transformation_steps_by_its_own",
            "test_optimize_loss.py::test_no_rate_and_a_function_of_nothing_step_from_10_to_9_5",
        ),
    ),
    Row("A8", "a learning rate of shape (2,)", "ValueError at construction", _bad("learning_rate=array([1., 1.])")),
    Row(
        "A9",
        "a learning rate that is traced, or changes between steps",
        "one program for all rates, in the dtype of the parameters",
        (
            "test_optimize_loss.py::test_a_rate_put_into_the_state_is_used_without_a_recompilation",
            "test_optimize_loss.py::test_vmap_over_rates_trains_them_all_in_one_program",
            "test_optimize_loss.py::test_a_traced_rate_is_taken_at_construction",
            "test_contract.py::test_dtypes_stay",
        ),
    ),
    Row("A10", "a complex learning rate", "ValueError at construction", _bad("learning_rate=1j")),
    Row(
        "A11",
        "an optimizer's name misspelt",
        "ValueError at construction that lists the names and says the nearest",
        _bad("optimizer='adam'", "optimizer='Adamm'", "optimizer='sgd'", "optimizer='Adam '"),
    ),
    Row(
        "A12a",
        "an optimizer that is a function or class of the rate",
        "is called with the rate",
        (
            "test_optimize_loss.py::test_every_form_of_an_optimizer_steps_from_10_to_9_5",
            "test_fault_settings.py::test_a_class_of_the_rate_is_an_optimizer",
        ),
    ),
    Row(
        "A12b",
        "an optimizer that is nothing of the kind",
        "ValueError at construction",
        _bad("optimizer=<object object>"),
    ),
    Row("A13", "a function that returns no optimizer", "ValueError at construction", (_BAD,)),
    Row(
        "A14a",
        "a limit of the norm that is negative or NaN",
        "ValueError at construction",
        (
            *_bad("clip_gradients=-1.0", "clip_gradients=nan", "clip_gradients=-inf"),
            "test_chain.py::test_a_chain_takes_nonsense_for_a_setting",
        ),
    ),
    Row(
        "A14b",
        "a limit of 0",
        "makes every gradient 0, never NaN; `explain` warns",
        ("test_parity.py::test_a_limit_of_which_the_original_made_nan_is_a_limit", _EXPLAIN),
    ),
    Row("A15", "a limit of 5, an int, or of another type", "clips as 5.0 does, to the bit", (_NUMBER,)),
    Row("A16", "a limit of infinity", "never clips; `explain` warns", (_NUMBER, _EXPLAIN)),
    Row("A17", "a limit that is a string", "ValueError at construction", _bad("clip_gradients='1.0'")),
    Row(
        "A18",
        "a clip that takes or returns something else",
        "TypeError at construction, or an error at `init` that names the function and the shapes",
        (
            "test_bad_input.py::test_a_bad_setting_is_an_error_at_construction",
            "test_bad_input.py::test_what_building_could_not_find_is_an_error_at_init",
            _BAD,
        ),
    ),
    Row(
        "A19a",
        "settings of the adaptive clip out of their bounds",
        "ValueError or TypeError at construction",
        ("test_bad_input.py::test_a_bad_setting_of_the_adaptive_clip_is_an_error", _BAD),
    ),
    Row(
        "A19b",
        "an adaptive decay of 1",
        "works: with the counter it is the mean of all norms",
        ("test_fault_settings.py::test_an_adaptive_decay_of_1_with_a_counter_averages_all_norms_alike",),
    ),
    Row(
        "A20",
        "a noise scale that is negative, NaN, infinite or no number",
        "ValueError or TypeError at construction",
        _bad(
            "gradient_noise_scale=-0.01",
            "gradient_noise_scale=nan",
            "gradient_noise_scale=inf",
            "gradient_noise_scale='1'",
        ),
    ),
    Row("A21", "noise without a key", "ValueError at `init`", _bad("gradient_noise_scale=0.1")),
    Row(
        "A22",
        "a key as an integer, a typed key or its data",
        "train alike, to the bit",
        (
            "test_noise.py::test_a_seed_a_typed_key_and_its_data_are_one_key",
            "test_fault_settings.py::test_a_seed_a_typed_key_and_its_data_train_alike",
        ),
    ),
    Row(
        "A23a",
        "a seed from 2**32 to 2**64",
        "both its words count",
        ("test_noise.py::test_both_words_of_a_large_seed_count",),
    ),
    Row(
        "A23b",
        "a seed that is negative or beyond 2**64",
        "ValueError at construction",
        _bad("key=-1", "key=18446744073709551616", "key=1180591620717411303424"),
    ),
    Row("A24", "several keys for one", "TypeError at construction that shows the shape", (_BAD,)),
    Row(
        "A25",
        "a multiplier for a name that no parameter has",
        "ValueError at `init` with the nearest name and the parameters",
        (
            *_bad("gradient_multipliers={'v': 1.0}", "gradient_multipliers={'w:0': 1.0}"),
            "test_frameworks.py::test_a_wrong_name_is_answered_with_the_names_of_the_framework",
            "test_chain.py::test_a_chain_takes_nonsense_for_a_setting",
        ),
    ),
    Row(
        "A26",
        "a multiplier that is a string, None, not finite, or of a wrong shape",
        "an error at construction or, for the shape, at `init`, with the name",
        _bad(
            "gradient_multipliers={'w': '2'}",
            "gradient_multipliers={'w': None}",
            "gradient_multipliers={'w': nan}",
            "gradient_multipliers={'w': inf}",
            "gradient_multipliers={'w': array([1., 1.])}",
        ),
    ),
    Row(
        "A27",
        "a multiplier of 0",
        "parameter and slots stay, to the bit",
        ("test_fault_settings.py::test_a_multiplier_of_0_leaves_a_parameter_and_its_slots_to_the_bit",),
    ),
    Row(
        "A28",
        "two patterns on one parameter",
        "ValueError at `init` with both",
        _bad("gradient_multipliers={'w*': 1.0, '*': 2.0}", "gradient_multipliers={'*': 2.0, '**': 3.0}"),
    ),
    Row(
        "A29",
        "nothing that could be trained",
        "ValueError at construction or `init`",
        (
            *_bad("variables=[]", "variables=()", "variables={'w': False, 'n': True}", "init({},) {}"),
            "test_bad_input.py::test_what_building_could_not_find_is_an_error_at_init",
        ),
    ),
    Row(
        "A30",
        "variables that no parameter is named by",
        "ValueError at `init` with the nearest name",
        _bad("variables=['v']", "variables='kernel'", "variables=('W',)"),
    ),
    Row(
        "A31",
        "parameters that are not selected",
        "keep their bits for 10,000 steps of noise and weight decay; no slots",
        (
            "test_fault_settings.py::test_a_parameter_that_is_not_selected_keeps_its_bits_for_ten_thousand_steps_and_has_no_state",
            "test_optimize_loss.py::test_parameters_that_are_not_selected_have_no_slots_and_no_gradient",
            "test_chain.py::test_a_chain_moves_frozen_parameters",
        ),
    ),
    Row(
        "A32",
        "variables as a tree of strings, numbers or arrays, or of another structure",
        "TypeError at construction, ValueError at `init`",
        _bad(
            "variables={'w': 'False'}",
            "variables={'w': 1.0, 'n': 0.0}",
            "variables={'w': array([ True, False])}",
            "variables={'w': True}",
        ),
    ),
    Row(
        "A33",
        "a decay of other arguments, or that returns no scalar, or asks a traced step",
        "an error at construction with the function's file and line",
        (
            "test_fault_settings.py::test_the_error_of_a_function_says_where_the_function_stands",
            "test_bad_input.py::test_a_bad_setting_is_an_error_at_construction",
            _BAD,
        ),
    ),
    Row(
        "A34a",
        "a decay that gives NaN or infinity at some step",
        "no step is taken from there on, and each is counted",
        ("test_fault_settings.py::test_a_decay_that_gives_no_finite_rate_stops_the_parameters_and_is_counted",),
    ),
    Row(
        "A34b",
        "a decay that gives a negative rate",
        "the rate is applied as it is",
        why_not="the sign is the user's: TF1's own noisy decays cross 0, and the rate is a summary",
    ),
    Row(
        "A35",
        "decay_steps of 0, boundaries that do not increase",
        "ValueError, at construction where the decay is called with it",
        ("test_decay.py::test_a_bad_setting_is_an_error_that_names_it", _BAD),
    ),
    Row(
        "A36",
        "a summary that is not known",
        "ValueError at construction with the nearest name and all of them",
        _bad("summaries=['los']", "summaries=['loss', 'bad_summary']"),
    ),
    Row(
        "A37",
        "an argument that is not known",
        "Python's TypeError, which from 3.13 on says the nearest",
        ("test_fault_settings.py::test_an_unknown_argument_is_a_type_error_at_construction_that_names_it",),
    ),
    Row("A38a", "10,000 random settings with one to three faults", "an error that names one of them", (_RANDOM,)),
    Row(
        "A38b",
        "random settings without a fault",
        "train",
        ("test_fault_settings.py::test_random_settings_without_a_fault_train",),
    ),
    # ---- B: losses, batches and parameters
    Row("B1", "a loss of shape (4,) or (1,)", "ValueError at `init`, or at the first step: its mean?", (_BAD_LOSS,)),
    Row("B2", "a loss with aux without has_aux, or the reverse", "ValueError that says has_aux", (_BAD_LOSS, _BAD)),
    Row("B3", "a loss that is an int, a bool, complex, None or a string", "ValueError", (_BAD_LOSS, _BAD)),
    Row(
        "B4",
        "a loss that depends on no trained parameter",
        "ValueError at `init` where it is given the batch, as in TF1",
        (
            "test_bad_input.py::test_a_loss_that_depends_on_no_trained_parameter_is_a_value_error_at_init",
            _BAD_LOSS,
        ),
    ),
    Row(
        "B5",
        "a parameter that the loss does not use",
        "stays, without a word, as in TF1",
        ("test_optimize_loss.py::test_a_parameter_without_a_gradient_is_no_error",),
    ),
    Row(
        "B6",
        "a loss of NaN with finite gradients",
        "the step changes nothing but its count",
        ("test_fault_settings.py::test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is",),
    ),
    Row(
        "B7",
        "an infinite gradient of a finite loss",
        "the step changes nothing but its count; the norms say which parameter's",
        (
            "test_fault_settings.py::"
            "test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is_and_its_norm_shows_which",
        ),
    ),
    Row(
        "B8",
        "a loss of 16 bits",
        "trains; summaries are float32",
        ("test_fault_settings.py::test_a_loss_of_16_bits_trains_and_is_reported_in_float32",),
    ),
    Row(
        "B9",
        "a batch of a wrong shape",
        "JAX's own error, before anything runs: the state lives",
        (
            "test_fault_settings.py::test_a_batch_of_a_wrong_shape_is_jax_s_error_at_init_before_anything_runs",
            "test_live_state.py::test_an_error_while_tracing_leaves_the_state_alive",
        ),
    ),
    Row(
        "B10",
        "a last small batch",
        "one more program, which stays",
        ("test_fault_settings.py::test_a_last_small_batch_is_one_more_program_and_nothing_else",),
    ),
    Row(
        "B11",
        "a batch of nothing",
        "the step changes nothing but its count",
        ("test_fault_settings.py::test_an_empty_batch_is_skipped",),
    ),
    Row(
        "B12a",
        "parameters that are integers or booleans",
        "stay as they are",
        (
            "test_contract.py::test_an_integer_leaf_is_left_unchanged",
            "test_fault_settings.py::test_a_boolean_parameter_stays_and_the_others_train",
        ),
    ),
    Row(
        "B12b",
        "an integer that is named as to be trained",
        "ValueError at `init`",
        _bad("variables=['n']", "variables='n'"),
    ),
    Row(
        "B13",
        "None among the parameters",
        "stays None",
        (
            "test_contract.py::test_trees_stay[none_leaf-optimize_loss]",
            "test_noise.py::test_integers_and_none_get_no_noise",
        ),
    ),
    Row(
        "B14a",
        "gradients in another order, or in a FrozenDict",
        "go to the parameters of their names",
        ("test_fault_settings.py::test_gradients_in_another_order_or_mapping_are_those_of_their_names",),
    ),
    Row(
        "B14b",
        "gradients given to the transformation that lack a parameter's or have another shape",
        "ValueError that names the first gradient that does not fit",
        ("test_misfits.py::test_gradients_that_are_not_the_parameters_are_named",),
    ),
    Row(
        "B15a",
        "parameters without elements, or of any rank",
        "train",
        (
            "test_fault_settings.py::test_a_parameter_of_any_rank_trains",
            "test_contract.py::test_an_empty_leaf_changes_nothing_for_the_others",
        ),
    ),
    Row(
        "B15b",
        "very many parameters",
        "the program grows with their number, its kernels with that of their shapes",
        (
            "test_fault_settings.py::test_a_program_grows_with_the_number_of_arrays_and_no_faster",
            "test_speed.py::test_arrays_of_one_shape_share_their_kernels",
        ),
    ),
    Row(
        "B16",
        "complex parameters",
        "TypeError at `init` where they would be trained",
        ("test_bad_input.py::test_a_complex_parameter_is_a_type_error_unless_it_is_not_trained",),
    ),
    Row(
        "B17",
        "parameters that are Python numbers or NumPy's",
        "one program; the caller's arrays stay",
        ("test_live_state.py::test_whatever_parameters_are_given_as_is_neither_changed_nor_traced_twice",),
    ),
    Row(
        "B18",
        "parameters of a weak type",
        "one program",
        ("test_live_state.py::test_whatever_parameters_are_given_as_is_neither_changed_nor_traced_twice",),
    ),
    Row(
        "B19",
        "one array as two parameters",
        "two parameters from then on",
        (
            "test_optimize_loss.py::test_what_the_caller_gave_stays_alive",
            "test_live_state.py::test_tied_arrays_become_two_parameters_and_both_learn",
        ),
    ),
    Row(
        "B20",
        "parameters that are also an average's",
        "copied: both live",
        ("test_live_state.py::test_an_average_that_starts_as_the_parameters_stays_alive",),
    ),
    Row(
        "B21",
        "a state that an update was given before",
        "ValueError that says so and how to keep one",
        ("test_live_state.py::test_a_state_used_twice_is_an_error_that_explains_it",),
    ),
    Row(
        "B22",
        "a loss that leaks a tracer",
        "JAX's own error; the step itself leaks none",
        ("test_fault_settings.py::test_a_step_leaks_no_tracer_and_a_loss_that_leaks_one_is_told_by_jax",),
    ),
    Row(
        "B23",
        "a loss with side effects",
        "once a step, and none in `init`",
        ("test_fault_settings.py::test_a_callback_in_the_loss_runs_once_a_step_and_never_in_init",),
    ),
    Row(
        "B24",
        "a callback in the loss that raises",
        "its error, with what became of the state and how to keep one",
        ("test_live_state.py::test_a_step_that_fails_while_it_runs_says_that_the_state_is_lost_and_how_to_keep_one",),
    ),
    Row(
        "B25a",
        "a state of another op or optimizer",
        "ValueError or TypeError",
        (
            "test_bad_input.py::test_a_state_of_another_op_is_a_value_error",
            "test_fault_settings.py::test_a_state_of_another_optimizer_of_like_slots_is_a_type_error",
        ),
    ),
    Row(
        "B25b",
        "a state put together by hand, of slots and parameters of different shapes",
        "ValueError that names the first array that does not fit",
        ("test_misfits.py::test_a_state_for_other_parameters_is_named",),
    ),
]
