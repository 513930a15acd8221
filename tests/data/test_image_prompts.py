"""Contexts with images: the chat template places them, the model's processor makes their ids."""

import unicodedata

import pytest
from helpers.image_models import make_image_model, make_tokenizer, picture, write_processor
from helpers.training_cases import ROWS
from transformers import Qwen3VLProcessor

from opsd.common.errors import UserError
from opsd.config.sections import ModelSection, PromptsSection
from opsd.data.images import MARK, read_images
from opsd.data.prompts import Prompts, UnreadableRowError
from opsd.data.rows import Row
from opsd.models.images import ImageIds, ImageReader

SHOWN = {"student": "1{{ images }}{{ problem }}", "teacher": "{{ problem }}{{ solution }}"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    files = write_processor(tmp_path_factory.mktemp("processor"))
    tokenizer = make_tokenizer()
    config = make_image_model().config
    tokenizer.images = ImageReader(ModelSection(path=str(files)), config, tokenizer)
    return tokenizer


def make_row(problem="1+2", images=((40, 20, 1),), **more):
    encoded = read_images([picture(*size) for size in images], None)
    return Row(problem, "3", "3", {"problem": problem, **more}, images=encoded)


def make_prompts(tokenizer, **section):
    return Prompts(PromptsSection(**SHOWN | section), tokenizer)


def by_transformers(tokenizer, row, before, after):
    """The processor's ids and patches of a message with the row's images between two texts."""
    content = [{"type": "text", "text": before}] if before else []
    content += [{"type": "image"} for _ in row.images] + [{"type": "text", "text": after}]
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    processor = tokenizer.images.processor
    assert isinstance(processor, Qwen3VLProcessor)
    images = [image.pixels() for image in row.images]
    return processor(text=[text], images=images, return_tensors="pt")


@pytest.mark.parametrize("images", [((40, 20, 1),), ((16, 16, 1), (8, 30, 2), (64, 64, 3))])
def test_ids_and_patches_are_the_processors(images, tokenizer):
    row = make_row(images=images)
    prompts = make_prompts(tokenizer)
    context = prompts.context(row)
    wanted = by_transformers(tokenizer, row, "1", "1+2")
    assert context.student == wanted["input_ids"][0].tolist()
    given = context.student.inputs(more=2)
    assert given.pop("mm_token_type_ids").tolist() == [
        [*wanted["mm_token_type_ids"][0].tolist(), 0, 0]
    ]
    assert given.keys() == {"pixel_values", "image_grid_thw"}
    assert all((given[name] == wanted[name]).all() for name in given)
    assert type(context.teacher) is list  # its template shows none
    assert prompts.lengths([row], "student") == [len(context.student)]
    assert prompts.longest([row], "student") == [None]


def test_our_own_templates_show_images_first(tokenizer):
    row = make_row()
    section = PromptsSection()
    prompts = Prompts(section, tokenizer)
    for role in ("student", "teacher"):
        message = prompts.render(row, role).rpartition(MARK)[2]
        wanted = by_transformers(tokenizer, row, "", message)["input_ids"][0].tolist()
        assert message.startswith("1+2") and prompts.ids(row, role) == wanted
    plain = Row("1+2", "3", "3", {})
    assert type(prompts.ids(plain, "student")) is list


def test_rows_with_and_without_images_and_each_use_anew(tokenizer):
    rows = [make_row(), ROWS[0], make_row("3-4")]
    prompts = make_prompts(tokenizer)
    first, again = (prompts.all_ids(rows, "student") for _ in range(2))
    assert [isinstance(ids, ImageIds) for ids in first] == [True, False, True]
    assert first == again and first[0] is not again[0]
    assert not any(isinstance(ids, ImageIds) for ids in prompts.all_ids(rows, "teacher"))
    assert prompts.all_ids([rows[1]], "student")[0] == first[1]


def test_a_teacher_of_rollouts_sees_images(tokenizer):
    row = make_row()
    prompts = make_prompts(tokenizer, teacher="{{ images }}{{ problem }}{{ rollout }}")
    made = prompts.teacher_of(row, "7", [])
    assert made == by_transformers(tokenizer, row, "", "1+27")["input_ids"][0].tolist()
    assert made.images == row.images


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (make_row("1<|image_pad|>2"), "2 times, for 1 of its 1 images"),
        (make_row("1<|image_pad|>2", images=()), "1 times, for 0 of its 0 images"),
        (make_row(images=((500, 2, 1),)), "the model's processor refuses an image of it: .*ratio"),
        (make_row("1<|video_pad|>"), "the model's processor refuses an image of it"),
    ],
)
def test_what_would_stand_for_other_images_is_refused(row, said, tokenizer):
    with pytest.raises(UnreadableRowError, match=said):
        make_prompts(tokenizer).context(row)


def test_the_images_token_in_the_teachers_context_stands_for_no_image(tokenizer):
    with pytest.raises(UnreadableRowError, match="1 times, for 0 of its 1 images"):
        make_prompts(tokenizer).ids(make_row("1<|image_pad|>2"), "teacher")


def test_an_answer_has_no_images(tokenizer):
    with pytest.raises(UserError, match=r"prompts\.target: shows images, and an answer has none"):
        make_prompts(tokenizer, target="{{ images }}")
    prompts = make_prompts(tokenizer, target="<|image_pad|>{{ solution }}")
    with pytest.raises(UnreadableRowError, match=r"its target has '<.image_pad.>'"):
        prompts.target(make_row())
    assert tokenizer.decode(make_prompts(tokenizer).target(make_row())) == "3<|end|>"


@pytest.mark.parametrize("student", ["{{ problem }}", "{{ images }}{{ images }}"])
def test_templates_that_show_none_or_some(student, tokenizer):
    with pytest.raises(UserError, match=r"no template shows them|of its 1 images"):
        make_prompts(tokenizer, student=student).context(make_row())


def test_a_chat_template_that_drops_images_is_refused(tokenizer):
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("<|image_pad|>", "")
        with pytest.raises(UnreadableRowError, match="0 times, for 1 of its 1 images"):
            make_prompts(tokenizer).context(make_row())
    finally:
        tokenizer.chat_template = template


def test_a_row_cannot_guess_the_mark_of_an_image(tokenizer):
    """What a template is given for an image is drawn at random in each process, of private use."""
    mark = make_prompts(tokenizer).render(make_row(""), "student")[1:]
    assert len(mark) == 1 and unicodedata.category(mark) == "Co"


@pytest.mark.parametrize("part", ["images[1:]", "images[0]", "images | reverse | first"])
def test_a_template_cannot_cut_the_images(part, tokenizer):
    row = make_row(images=((8, 8, 1), (8, 8, 2)))
    with pytest.raises(UnreadableRowError, match="1 times, for 1 of its 2 images"):
        make_prompts(tokenizer, student="{{ " + part + " }}{{ problem }}").context(row)


def test_the_template_beside_an_older_processor_is_its_own(tmp_path):
    files, tokenizer = write_processor(tmp_path / "model"), make_tokenizer()
    (files / "chat_template.jinja").unlink()
    (files / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    ImageReader(ModelSection(path=str(files)), make_image_model().config, tokenizer)
    assert tokenizer.chat_template == "{{ messages }}"


def test_models_that_are_not_tried_or_have_no_processor_are_refused(tmp_path, tokenizer):
    config = make_image_model().config
    with pytest.raises(UserError, match=r"model.path is .*: it has no processor of images \("):
        ImageReader(ModelSection(path=str(tmp_path)), config, tokenizer)
    config.model_type = "gemma3"
    with pytest.raises(UserError, match=r"work with qwen2_vl, .*, not with gemma3"):
        ImageReader(ModelSection(path=str(tmp_path)), config, tokenizer)
