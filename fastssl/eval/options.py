"""Options of `fastssl eval`, in a file without torch, so that --help and errors in options take no seconds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fastssl.config import Optim, settings
from fastssl.config.backbone_options import add_backbone_options
from fastssl.parsing import Parser, comma_separated, docstring, existing

MAPS = ("pca", "tsne", "umap")
SVM_COSTS = (*(0.5**n for n in range(19, 3, -1)), 1.0, 10.0, 100.0)
WITHOUT = {  # shared options that would have no effect, by their names in `args`
    "classifier": ("train", "features"),
    "semisup": ("cache", "no_cache"),  # the network is trained: there are no features to cache
    "finetune": ("cache", "no_cache"),
    "detection": ("cache", "no_cache", "size", "resize", "batch"),  # whole images are used, at --min-size
    "maps": ("train",),
}


FOLDER = Path(__file__).parent


def parser(protocol: str) -> Parser:
    """The parser of `fastssl eval PROTOCOL`; its description is the docstring of the protocol's module."""
    module = next(p for p in (FOLDER / f"{protocol}.py", FOLDER / protocol / "__init__.py") if p.exists())
    out = Parser(f"fastssl eval {protocol}", docstring(module))
    add_target_options(out, WITHOUT.get(protocol, ()))
    add_protocol_options(out, protocol)
    return out


def target_options(**given: object) -> argparse.Namespace:
    """The options that protocols share, with their defaults and those that are given."""
    out = argparse.ArgumentParser()
    add_target_options(out)
    return argparse.Namespace(**{**vars(out.parse_args([])), **given})


def add_protocol_options(parser: argparse.ArgumentParser, protocol: str) -> None:
    """The options that one protocol alone has."""
    adders = (_knn, _linear, _classifier, _extract, _svm, _semisup, _finetune, _detection, _maps, _neighbours)
    {add.__name__[1:]: add for add in adders}[protocol](parser.add_argument)


def add_target_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """The options that protocols share.  Those in `without` are not offered by the command and have their defaults."""

    def add(name: str, **options) -> None:
        key = name.removeprefix("--").replace("-", "_")
        if key in without:
            parser.set_defaults(**{key: options.get("default")})
        else:
            parser.add_argument(name, **options)

    about = "run folder, checkpoint folder, .safetensors, .pt or .pth"
    add("target", nargs="?", type=existing, metavar="RUN_OR_WEIGHTS", help=about)
    add("--train", help=".beton of the bank or the training set; default: the run's")
    add("--test", help=".beton to evaluate on; default: the run's")
    kinds = ("weights", "untrained", "pixels")
    add("--features", choices=kinds, default="weights", help="of the network, or of a baseline")
    add("--cache", metavar="DIR", help="where features are stored; default: features/ in the folder of the weights")
    add("--no-cache", action="store_true", help="compute the features and do not store them")
    add("--out", help="write the result as JSON; default: eval/PROTOCOL.json in the run's folder, if it is a run")
    add("--which", choices=("student", "teacher"), help="the network or its moving average; default: the method's")
    add("--prefix", help="prefix of the backbone's keys in the file, e.g. teacher.backbone.; default: detected")
    add_backbone_options(parser)
    add("--size", type=int, help="side of the centre crop")
    add("--resize", type=int, help="short side before the crop, 0: none; default: by the images' sizes")
    add("--mean", type=comma_separated(float), help="R,G,B of the normalisation; default: the run's, else ImageNet's")
    add("--std", type=comma_separated(float), help="as --mean")
    add("--batch", type=int, default=256, help="images per rank and pass")
    add("--workers", type=int, help="decoding threads per rank; default: the cores of the machine, shared by its ranks")
    add("--precision", choices=settings.choices(Optim, "precision"), default="fp32", help="of the network")
    add("--device", help="cpu or cuda; default: cuda when there is one")
    add("--seed", type=int, default=0, help="of random numbers")


def _knn(add: Callable) -> None:
    add("--k", type=comma_separated(int), help="numbers of neighbours; default: 10,20,100,200, up to the images")
    add("--temperature", type=float, default=0.07, help="T in the weights exp(cosine / T) of the votes")
    add("--backend", choices=("torch", "faiss"), default="torch", help="of the search")


def _linear(add: Callable) -> None:
    add(
        "--recipe",
        choices=("probe", "moco", "multi", "places205", "lars"),
        default="probe",
        help="probe: on cached features, the rate chosen on held-out images; the others as published",
    )
    add("--solver", choices=("sgd", "lbfgs"), help="of the probe; default: sgd")
    add("--grid", type=comma_separated(float), help="learning rates (lbfgs: l2 penalties); default: the recipe's")
    add("--epochs", type=int, help="default: the recipe's; probe: 100 (lbfgs: the most iterations)")
    add("--probe-batch", type=int, help="of all ranks together; default: the recipe's, probe: 1024")
    add("--held-out", type=float, help="fraction to choose the setting on; default: 0.1 for the probe, 0 for recipes")
    add("--layers", type=comma_separated(str), help="of recipes: stem,layer1,...,layer4,last; default: the recipe's")
    add("--no-augment", action="store_true", help="recipes on cached features: faster, and not what papers report")


def _classifier(add: Callable) -> None:
    add("--head", metavar="NAME", help="name of the linear layer in the file, e.g. head.fc_cls; default: found")


def _extract(add: Callable) -> None:
    add(
        "--layers",
        type=comma_separated(str),
        default=("last",),
        help="stem,layer1,layer2,layer3,layer4,last (other networks than ResNets: stage1, ...) or all",
    )
    add("--only", choices=("train", "test"), help="one of the two files; default: both")
    add("--to", choices=("npy", "safetensors"), default="npy", help="a file for each layer, or one for all")
    add("--squash", action="store_true", help="the whole image at the view's size instead of a crop (VOC07)")
    add("--folder", help="default: eval/ in the run's folder")
    add("--force", action="store_true", help="replace files that are there")


def _svm(add: Callable) -> None:
    add("--layers", type=comma_separated(str), default=("last",), help="stem,layer1,...,layer4,last")
    add("--low-shot", action="store_true", help="few images a class instead of all")
    add("--shots", type=comma_separated(int), help="positives of each class; default: 1,2,4,8,16,32,64,96")
    add("--samples", type=int, help="independent draws of each number of shots; default: 5")
    add("--costs", type=comma_separated(float), default=SVM_COSTS, help="default: the published 19")
    add("--folds", type=int, help="of the cross-validation; default: 3")
    add("--solver", choices=("fast", "cuda", "sklearn"), default="fast", help="default: fast")
    add("--crop", choices=("squash", "center"), default="squash", help="squash: the whole image, as published")


def _semisup(add: Callable) -> None:
    add("--percent", type=float, help="of the training images of each class, drawn by --seed; default: 1")
    add("--subset", metavar="FILE", help="labelled images: rows from 0, or names with --names; 'all': those of --train")
    add("--names", metavar="FILE", help="names of all images in order: the list that the .beton was converted from")
    add("--lr", type=comma_separated(float), help="rates of the backbone; default: 0.001,0.01,0.1 (Sobel: 0.01)")
    add("--head-mult", type=comma_separated(float), help="multiples of --lr for the head; default: 1,10,100 (Sobel: 1)")
    add("--held-out", type=float, default=0.2, help="fraction of the labelled images, for the held-out row; 0: none")
    add("--train-batch", type=int, default=256, help="of all ranks together")
    add("--epochs", type=int, default=20, help="of each training")
    add("--milestones", type=comma_separated(float), default=(12.0, 16.0), help="epochs where rates fall by --gamma")
    add("--gamma", type=float, default=0.2, help="see --milestones")
    add("--weight-decay", type=float, help="default: 5e-4 for 1 %%, 1e-4 for 10 %%")
    _micro_batch(add)


def _finetune(add: Callable) -> None:
    add("--optimizer", choices=("adamw", "sgd"), help="default: adamw for transformers, else sgd")
    add("--lr", type=float, help="for a batch of 256; scaled linearly; default: 5e-4 for transformers, else 0.05")
    add("--train-batch", type=int, help="of all ranks together; default: 1024 for transformers, else 256")
    add("--epochs", type=int, help="default: 100 for transformers, else 30")
    add("--warmup-epochs", type=float, help="default: 5 for transformers, else 0; then a cosine")
    add("--weight-decay", type=float, help="default: 0.05 for transformers (not on norms and biases), else 0")
    add("--layer-decay", type=float, help="of the rate, from a block to the one before; default: 0.65 (others: 1)")
    add("--drop-path", type=float, help="stochastic depth in the last block; default: 0.1 for transformers, else 0")
    add("--smoothing", type=float, help="label smoothing; default: 0.1 for transformers, else 0")
    add("--mixup", type=float, default=0.0, help="alpha (MAE: 0.8)")
    add("--cutmix", type=float, default=0.0, help="alpha (MAE: 1.0)")
    add("--clip", type=float, default=0.0, help="largest norm of the gradient; 0: no clipping")
    add("--pool", choices=("avg", "token"), help="transformers: input of the head (MAE: avg); default: timm's")
    _micro_batch(add)


def _micro_batch(add: Callable) -> None:
    add("--micro-batch", type=int, help="images per rank and pass; default: all of the rank")


def _detection(add: Callable) -> None:
    add("--voc", metavar="FOLDER", help="VOCdevkit: holds VOC2007, VOC2012 (Annotations, ImageSets, JPEGImages)")
    add("--coco", metavar="FOLDER", help="holds annotations/instances_SPLIT.json and the images in SPLIT/")
    add("--train-split", help="default: VOC2007/trainval,VOC2012/trainval or train2017")
    add("--test-split", help="default: VOC2007/test or val2017")
    add("--classes", help="names for other data in VOC's format, comma-separated; default: VOC's 20")
    add("--drop-empty", action="store_true", help="leave out boxes without area; default: they are an error")
    add("--schedule", choices=("24k", "1x", "2x"), help="default: 24k for VOC, 1x for COCO")
    add("--steps", type=int, help="instead of --schedule, with its milestones and warm-up in proportion")
    add("--train-batch", type=int, default=16, help="images of all ranks together")
    add("--lr", type=float, default=0.02, help="for 16 images; scaled linearly with --train-batch")
    add("--weight-decay", type=float, default=1e-4, help="not of norms")
    add("--bn", choices=("sync", "frozen"), default="sync", help="batch norm over all ranks, or as pretrained")
    add(
        "--min-size",
        type=comma_separated(int),
        help="short sides to draw from, the last in tests; default: 480 (COCO: 640) to 800 by 32",
    )
    add("--max-size", type=int, default=1333, help="of the long side")


def _maps(add: Callable) -> None:
    add("--method", default="tsne", help=f"some of {', '.join(MAPS)}, with commas between them")
    add("--points", type=int, default=5000, help="images drawn from the test file; 0: all")
    add("--perplexity", type=float, help="of t-SNE; default: 30, or a third of fewer than 90 points")
    add("--near", type=int, help="n_neighbors of UMAP; default: 15")
    add("--min-dist", type=float, help="min_dist of UMAP; default: 0.1")
    add("--folder", help="for map_METHOD.png and .npy; default: eval/ in the run's folder")


def _neighbours(add: Callable) -> None:
    add("--k", type=int, default=8, help="neighbours of each image")
    add("--queries", type=int, default=10, help="test images on the sheet, drawn by --seed")
    add("--folder", help="for neighbours.png; default: eval/ in the run's folder")
