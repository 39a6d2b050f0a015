"""Numbers that the authors of JoMA published, or that their code fixes.

JoMA (https://arxiv.org/abs/2310.00535); code: the folder joma of
github.com/facebookresearch/luckmatters, ssl/real-dataset, at commit 625b5f7.

  FIGURE4_MU   draw_figure_4.py: what the components of Figure 4 tend to,
               sort(3 rand(10) + 1) in float32 after torch.manual_seed(0)
"""

FIGURE4_MU = (
    1.265432357788086,
    1.3960914611816406,
    1.9222683906555176,
    2.3668839931488037,
    2.470280170440674,
    2.488769769668579,
    2.896918773651123,
    2.902235984802246,
    3.3046653270721436,
    3.6893341541290283,
)
