"""The worked examples of few-shot prompts: invented pages, one list for each data set.

FinQA's show what its questions ask most (percentage change, portions, averages, yes/no). FinQA-mini's use families
that pocket-mistral knows from pretraining alone, so that no prompt teaches what fine-tuning is to add.
"""

from __future__ import annotations

from dataclasses import dataclass

from finqa.task.records import Question


@dataclass(frozen=True)
class WorkedExample:
    """A question and the program that a good teacher writes for it."""

    question: Question
    code: str


def _example(
    pre_text: str, table: list[list[str]], post_text: str, question: str, answer: str, program: str, code: str
) -> WorkedExample:
    return WorkedExample(Question("", pre_text, post_text, table, question, answer, program), code)


FINQA_EXAMPLES = (
    _example(
        "harbor tools inc . reports the results of its two segments for the years ended december 31 .\n"
        "amounts are in millions of dollars .",
        [
            ["( in millions )", "2011", "2010", "2009"],
            ["net sales", "$ 1284.5", "$ 1190.2", "$ 1101.9"],
            ["cost of sales", "802.1", "755.0", "718.4"],
            ["operating income", "153.3", "141.7", "-12.6 ( 12.6 )"],
        ],
        "net sales rose in 2011 on higher volumes in north america .",
        "what was the percentage change in net sales from 2010 to 2011?",
        "0.07923",
        "subtract(1284.5, 1190.2), divide(#0, 1190.2)",
        "net_sales_2011 = 1284.5\n"
        "net_sales_2010 = 1190.2\n"
        "# (net_sales_2011 - net_sales_2010) / net_sales_2010\n"
        "change = net_sales_2011 - net_sales_2010\n"
        "ans = change / net_sales_2010",
    ),
    _example(
        "the company's contractual obligations as of june 30 , 2014 are shown below .",
        [
            ["obligation", "total", "due in 2015", "due after 2015"],
            ["operating leases", "$ 412", "$ 96", "$ 316"],
            ["long-term debt", "2150", "250", "1900"],
            ["purchase commitments", "88", "70", "18"],
        ],
        "interest is not included . the credit facility bears interest at 4.25% ( 4.25 % ) .",
        "what portion of the long-term debt is due in 2015?",
        "0.11628",
        "divide(250, 2150)",
        "long_term_debt_due_in_2015 = 250\n"
        "long_term_debt_total = 2150\n"
        "ans = long_term_debt_due_in_2015 / long_term_debt_total",
    ),
    _example(
        "during the third quarter we repurchased 1200000 shares of common stock at an average price of $ 31.50 .\n"
        "the board authorized a program of $ 150 million in may 2006 .",
        [
            ["month", "shares repurchased", "average price paid"],
            ["july", "300000", "$ 30.10"],
            ["august", "500000", "$ 31.00"],
            ["september", "400000", "$ 33.18"],
        ],
        "",
        "what was the average number of shares repurchased in august and september?",
        "450000",
        "add(500000, 400000), divide(#0, const_2)",
        "shares_repurchased_august = 500000\n"
        "shares_repurchased_september = 400000\n"
        "# (shares_repurchased_august + shares_repurchased_september) / 2\n"
        "total = shares_repurchased_august + shares_repurchased_september\n"
        "ans = total / 2",
    ),
    _example(
        "the following compares the value of $ 100 invested on december 31 , 2003 .",
        [
            ["", "12/03", "12/05", "12/08"],
            ["lakeside utilities", "100.00", "121.40", "138.75"],
            ["industry index", "100.00", "118.90", "142.02"],
        ],
        "returns assume that dividends are reinvested .",
        "did lakeside utilities outperform the industry index by the end of 2008?",
        "no",
        "greater(138.75, 142.02)",
        "lakeside_utilities_2008 = 138.75\nindustry_index_2008 = 142.02\n"
        'ans = "yes" if lakeside_utilities_2008 > industry_index_2008 else "no"',
    ),
)

FINQA_MINI_EXAMPLES = (
    _example(
        "crestline logistics and its subsidiaries present selected financial data for 2005 and prior years .",
        [
            ["( dollars in millions )", "2005", "2004", "2003"],
            ["marketable securities", "$ 5644", "$ 7165", "$ 1467"],
            ["amortization", "8458", "6924", "3691"],
        ],
        "about 456 customers were added on average in each month .",
        "how much did amortization move in 2005 compared to 2003?",
        "4767.0",
        "subtract(8458, 3691)",
        "amortization_2005 = 8458\namortization_2003 = 3691\nans = amortization_2005 - amortization_2003",
    ),
    _example(
        "crestline holdings reports the following results for the year ended december 31 , 2004 .\n"
        "management plans for an annual growth of 6.5% ( 6.5 % ) .",
        [
            ["( dollars in millions )", "2004", "2003", "2002"],
            ["capital expenditures", "663.4", "907.9", "381.5"],
            ["stock compensation", "362.6", "140.9", "488.7"],
        ],
        "",
        "for 2004 , what is capital expenditures divided by stock compensation?",
        "1.82956",
        "divide(663.4, 362.6)",
        "capital_expenditures_2004 = 663.4\n"
        "stock_compensation_2004 = 362.6\n"
        "ans = capital_expenditures_2004 / stock_compensation_2004",
    ),
    _example(
        "riverside insurance reports the following results for the year ended december 31 , 2018 .",
        [
            ["( in thousands )", "2018", "2017", "2016"],
            ["premiums earned", "352", "4935", "989"],
            ["research and development", "8561", "7003", "755"],
        ],
        "the credit facility of $ 754 expires in 2016 .",
        "what was the highest premiums earned in the table?",
        "4935.0",
        "table_max(premiums earned, none)",
        "premiums_earned = [352, 4935, 989]\nans = max(premiums_earned)",
    ),
    _example(
        "the table below shows selected data of pioneer financial as of december 31 , 2014 .\n"
        "the board authorized 917 units , of which 471 were issued .",
        [
            ["in millions of dollars", "2014", "2013", "2012"],
            ["cost of sales", "3233", "5964", "355"],
            ["legal costs", "299", "4810", "3846"],
        ],
        "management plans for an annual growth of 4.5% ( 4.5 % ) .",
        "what number of authorized units is left?",
        "446.0",
        "subtract(917, 471)",
        "board_authorized_units = 917\n"
        "board_authorized_units_issued = 471\n"
        "ans = board_authorized_units - board_authorized_units_issued",
    ),
)

INVENTED_EXAMPLES = (
    _example(
        "harbor tools inc . reports the results of its two segments for the years ended december 31 .\n"
        "amounts are in millions of dollars .",
        [
            ["( in millions )", "2011", "2010", "2009"],
            ["net sales", "$ 1284.5", "$ 1190.2", "$ 1101.9"],
            ["cost of sales", "802.1", "755.0", "718.4"],
            ["operating income", "153.3", "141.7", "126.6"],
        ],
        "net sales rose in 2011 on higher volumes in north america .",
        "the velmar index of cost of sales and net sales from 2009 to 2010 is the sum of cost of sales of 2009 and "
        "cost of sales of 2010 . what is the velmar index of cost of sales and net sales from 2009 to 2010?",
        "1473.4",
        "add(718.4, 755.0)",
        "cost_of_sales = {2011: 802.1, 2010: 755.0, 2009: 718.4}\nans = cost_of_sales[2009] + cost_of_sales[2010]",
    ),
    _example(
        "the company's minimum payments under contracts that cannot be cancelled are shown below .",
        [
            ["", "2013", "2014", "2015", "2016"],
            ["operating leases", "$ 412", "$ 396", "$ 316", "$ 275"],
            ["purchase commitments", "2150", "1250", "1900", "88"],
        ],
        "interest is not included .",
        "the dorvent index of operating leases and purchase commitments from 2014 to 2016 is operating leases of 2016 "
        "divided by operating leases of 2014 . determine the dorvent index of operating leases and purchase "
        "commitments between 2014 and 2016 .",
        "0.69444",
        "divide(275, 396)",
        "operating_leases = {2013: 412, 2014: 396, 2015: 316, 2016: 275}\n"
        "ans = operating_leases[2016] / operating_leases[2014]",
    ),
    _example(
        "crestline utilities presents selected data of its plants .",
        [
            ["( in thousands )", "year ended june 30 , 2008", "year ended june 30 , 2007"],
            ["fuel expense", "$ 30410", "$ 28100"],
            ["depreciation", "9120", "-8844 ( 8844 )"],
            ["customers", "1215", "1190"],
        ],
        "",
        "the sulgrim index of customers and fuel expense from 2007 to 2008 is fuel expense of 2008 minus customers of "
        "2007 . calculate the sulgrim index of customers with fuel expense for 2007 to 2008 .",
        "29220",
        "subtract(30410, 1190)",
        "customers = {2008: 1215, 2007: 1190}\nfuel_expense = {2008: 30410, 2007: 28100}\n"
        "ans = fuel_expense[2008] - customers[2007]",
    ),
)
"""For invented metrics (study/invented): how a definition is followed, by formulas of one step that no metric has."""
