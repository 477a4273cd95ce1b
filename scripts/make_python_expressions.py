"""Write examples/python_expressions.jsonl: a request in English, and the one Python expression that answers it.

    python scripts/make_python_expressions.py

Everything is made here, from a fixed seed. An intent below is an expression and the ways to ask for it; ``$names``
are slots. Each way is put into one of a few frames ("give me …", "how do I …?"). The ways that begin with ``*`` are
kept for the test rows: a training row never uses one. One house style per intent, so that a request has one right
answer: ``x`` stands for an element, ``k, v`` for a key and its value, and strings are in double quotes.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from string import Template
from typing import NamedTuple

SEED = 0
TRAIN_ROWS, TEST_ROWS = 2000, 300
DESTINATION = Path(__file__).parents[1] / "examples" / "python_expressions.jsonl"

# "-" a thing, "!" something to do, "?" a statement that holds or not, "~" something to know, "=" a whole request.
FRAMES = """
- | $way | $way | $way | give me $way | I need $way | get $way | return $way | $way, please | can I have $way?
- | find $way
! | $way | $way | $way | please $way | how do I $way? | can you $way? | I want to $way | $way, please | I have to $way
? | check whether $way | whether $way | True if $way | tell me if $way | is it true that $way? | test that $way
? | does it hold that $way? | see if $way
~ | $way | $way | tell me $way | find out $way | I need to know $way | show me $way
= | $way
"""

SLOTS = """
nums    numbers prices scores values xs amounts weights lengths totals sizes temperatures readings
more    numbers prices scores values xs amounts weights lengths totals sizes temperatures readings
words   words names lines tokens titles cities tags labels fields parts
items   items rows entries results records queue tasks history events data
others  items rows entries results records queue tasks history events data
any     numbers prices scores values xs amounts weights lengths totals sizes temperatures readings
any     words names lines tokens titles cities tags labels fields parts
any     items rows entries results records queue tasks history events data
nested  rows matrix groups pages batches grid chunks
d       counts stock config settings table lookup options headers totals_by_day env
e       counts stock config settings table lookup options headers totals_by_day env
s       text line name title s word message query comment reply
set     seen allowed blocked members guests admins known wanted
other   seen allowed blocked members guests admins known wanted
v       n x count age total speed level score price width
w       n x count age total speed level score price width
objs    users orders books files jobs players events products
attr    price size date rating score age rank weight length cost
flag    active done valid visible paid ready locked empty
fn      clean parse load score normalize convert check encode build is_valid
n       2 3 4 5 6 7 8 9
step    2 3 4 5 10
big     10 12 15 18 20 25 30 40 50 60 75 100 200 250 500 1000
bigger  2000 3000 5000
sep     , ; - : / | _ .
ch      a b c d e f g h k l m n o p r s t w
lit     error warning http todo test admin draft key date total main new old user
lit2    done open yes no on off left right high low
key     name id size color price email date status level port
path    path source target filename log_file config_path
dir     folder root base output_dir cache_dir home
file    name filename leaf file_name
day     start birthday due first_day opened created
end     end deadline today closed finished
"""
ORDINALS = {"2": "second", "3": "third", "4": "fourth", "5": "fifth", "10": "tenth"}

INTENTS = """
sum($nums)
    - the sum of $nums
    - the total of all $nums
    - the sum of the numbers in $nums
    - the sum over $nums
    ! add up $nums
    ! sum all of $nums
    ! add all the numbers in $nums together
    = what do $nums add up to?
    = total of $nums
    * - the sum of everything in $nums
    * ! add together all $nums

max($nums)
    - the largest of $nums
    - the maximum of $nums
    - the biggest number in $nums
    - the highest value in $nums
    - the largest number in $nums
    ! pick the biggest of $nums
    = which of $nums is the largest?
    = max of $nums
    * - the largest value in $nums
    * - the highest number in $nums

min($nums)
    - the smallest of $nums
    - the minimum of $nums
    - the smallest number in $nums
    - the lowest value in $nums
    - the least of $nums
    ! pick the smallest of $nums
    = which of $nums is the smallest?
    = min of $nums
    * - the lowest number in $nums
    * - the smallest value that occurs in $nums

sum($nums) / len($nums)
    - the average of $nums
    - the mean of $nums
    - the average value of $nums
    - the arithmetic mean of $nums
    ! average $nums
    ! take the mean of $nums
    = what are $nums on average?
    = average over $nums
    * - the mean value of $nums
    * ! compute the average of the numbers in $nums

len($any)
    - the number of elements in $any
    - the length of $any
    - the size of the list $any
    ~ how many elements $any has
    ! count the elements of $any
    = how many elements are in $any?
    = how long is $any?
    = number of entries in $any
    * - the count of elements in $any
    * = how many entries does $any have?

sorted($any)
    - $any in ascending order
    - $any sorted
    - a sorted copy of $any
    - $any from smallest to largest
    ! sort $any
    ! put $any in order
    ! sort $any in ascending order
    = $any, smallest first
    * - $any sorted in ascending order
    * ! order $any from smallest to largest

sorted($any, reverse=True)
    - $any in descending order
    - $any sorted backwards
    - $any from largest to smallest
    - $any sorted, largest first
    ! sort $any in descending order
    ! sort $any, biggest first
    ! sort $any in reverse
    = $any, largest first
    * - $any sorted in descending order
    * ! order $any from largest to smallest

[x * x for x in $nums]
    - the squares of $nums
    - the squares of the numbers in $nums
    - the square of every number in $nums
    - a list of the squares of $nums
    ! square every number in $nums
    ! square all $nums
    ! multiply each of $nums by itself
    = $nums squared
    * - each number in $nums squared
    * ! square each of the numbers in $nums

[x * $n for x in $nums]
    - $nums times $n
    - every number in $nums times $n
    - $nums, each multiplied by $n
    ! multiply every number in $nums by $n
    ! multiply $nums by $n
    ! scale $nums by $n
    ! multiply each of $nums by $n
    = each of $nums times $n
    * - all $nums multiplied by $n
    * ! scale every number in $nums by a factor of $n

[x + $n for x in $nums]
    - $nums plus $n
    - every number in $nums plus $n
    - $nums, each increased by $n
    ! add $n to every number in $nums
    ! add $n to each of $nums
    ! increase every number in $nums by $n
    ! raise all $nums by $n
    = each of $nums plus $n
    * ! increase each of $nums by $n
    * ! add $n to all the numbers in $nums

[x for x in $nums if x > $big]
    - the numbers in $nums above $big
    - those of $nums that are greater than $big
    - all $nums over $big
    - the $nums larger than $big
    ! keep the numbers in $nums that are greater than $big
    ! keep only $nums above $big
    ! filter $nums to those over $big
    = which of $nums are above $big?
    * - the numbers in $nums that are larger than $big
    * ! select those of $nums over $big

[x for x in $nums if x < $big]
    - the numbers in $nums below $big
    - those of $nums that are less than $big
    - all $nums under $big
    - the $nums smaller than $big
    ! keep the numbers in $nums that are less than $big
    ! keep only $nums below $big
    ! filter $nums to those under $big
    = which of $nums are below $big?
    * - the numbers in $nums that are smaller than $big
    * ! select those of $nums under $big

[x for x in $nums if x % 2 == 0]
    - the even numbers in $nums
    - those of $nums that are even
    - all even $nums
    - only the even ones of $nums
    ! keep the even numbers in $nums
    ! filter $nums to the even ones
    = which of $nums are even?
    = even $nums only
    * - the numbers in $nums that are even
    * ! select the even ones among $nums

[x for x in $nums if x % 2 == 1]
    - the odd numbers in $nums
    - those of $nums that are odd
    - all odd $nums
    - only the odd ones of $nums
    ! keep the odd numbers in $nums
    ! filter $nums to the odd ones
    = which of $nums are odd?
    = odd $nums only
    * - the numbers in $nums that are odd
    * ! select the odd ones among $nums

[x for x in $nums if x % $n == 0]
    - the multiples of $n in $nums
    - those of $nums that are divisible by $n
    - the numbers in $nums divisible by $n
    - all $nums that are multiples of $n
    ! keep the multiples of $n in $nums
    ! keep $nums divisible by $n
    = which of $nums are divisible by $n?
    * - the numbers in $nums that are multiples of $n
    * ! select the numbers in $nums that are divisible by $n

[abs(x) for x in $nums]
    - the absolute values of $nums
    - the absolute value of every number in $nums
    - $nums without their signs
    - a list of the absolute values in $nums
    ! take the absolute value of each of $nums
    ! make all $nums absolute
    ! drop the signs of $nums
    * - the absolute value of each number in $nums
    * ! turn $nums into absolute values

[round(x, $n) for x in $nums]
    - $nums rounded to $n digits
    - $nums rounded to $n decimal places
    - every number in $nums rounded to $n digits
    ! round every number in $nums to $n digits
    ! round $nums to $n decimals
    ! round all $nums to $n decimal places
    ! round each of $nums to $n places
    * ! round the numbers in $nums to $n digits
    * - all $nums rounded to $n decimals

sum(x > $big for x in $nums)
    ~ how many of $nums are above $big
    - the number of $nums over $big
    - the count of $nums greater than $big
    ! count the numbers in $nums above $big
    ! count $nums greater than $big
    ! count how many of $nums are over $big
    = how many of $nums are greater than $big?
    = how many numbers in $nums are over $big?
    * ! count those of $nums that are over $big
    * = how many numbers in $nums are above $big?

any(x < 0 for x in $nums)
    ? any of $nums is negative
    ? some number in $nums is negative
    ? $nums has a negative number
    ? there is a negative number in $nums
    ? any number in $nums is below zero
    = is any of $nums negative?
    = are there negative numbers in $nums?
    * ? at least one of $nums is negative
    * = does $nums have any negative numbers?

all(x > $big for x in $nums)
    ? all $nums are above $big
    ? every number in $nums is greater than $big
    ? all of $nums are over $big
    ? each of $nums is larger than $big
    ? all the numbers in $nums are greater than $big
    = are all $nums above $big?
    = is every one of $nums over $big?
    * ? every one of $nums is greater than $big
    * = are all the numbers in $nums over $big?

$n in $nums
    ? $n is in $nums
    ? $nums contains $n
    ? $n is one of $nums
    ? the list $nums contains $n
    ? $n occurs in $nums
    = is $n in $nums?
    = does $nums contain $n?
    * ? the number $n is in $nums
    * = is $n one of the numbers in $nums?

$nums.count($n)
    ~ how often $n occurs in $nums
    - the number of times $n occurs in $nums
    - the number of ${n}s in $nums
    ! count the ${n}s in $nums
    ! count how often $n is in $nums
    = how many times does $n occur in $nums?
    = how often is $n in $nums?
    * ! count the times $n occurs in $nums
    * = how often does $n occur in $nums?

$any[:$n]
    - the first $n of $any
    - the first $n elements of $any
    - $any up to the first $n
    - the leading $n elements of $any
    ! take the first $n elements of $any
    ! take $n elements from the front of $any
    ! keep the first $n of $any
    = first $n in $any
    * - the first $n entries of $any
    * ! cut $any to its first $n elements

$any[-$n:]
    - the last $n of $any
    - the last $n elements of $any
    - the final $n elements of $any
    - the $n elements at the end of $any
    ! take the last $n elements of $any
    ! take $n elements from the end of $any
    ! keep the last $n of $any
    = last $n in $any
    * - the last $n entries of $any
    * ! cut $any to its last $n elements

$any[$n:]
    - $any without the first $n
    - everything in $any after the first $n
    - all but the first $n elements of $any
    - the rest of $any after the first $n
    ! skip the first $n of $any
    ! drop the first $n elements of $any
    ! leave out the first $n of $any
    = $any, skipping the first $n
    * - $any without its first $n elements
    * ! skip the first $n elements of $any

$any[-1]
    - the last of $any
    - the last element of $any
    - the final element of $any
    - the element at the end of $any
    ! take the last element of $any
    ! pick the last of $any
    = what comes last in $any?
    = last one in $any
    * - the last entry of $any
    * ! take the element at the end of $any

$any[0]
    - the first of $any
    - the first element of $any
    - the element at the front of $any
    - the very first element of $any
    ! take the first element of $any
    ! pick the first of $any
    = what comes first in $any?
    = first one in $any
    * - the first entry of $any
    * ! take the element at the start of $any

$any[::-1]
    - $any in reverse order
    - $any reversed
    - $any backwards
    - a reversed copy of $any
    - $any from the end to the start
    ! reverse $any
    ! turn the list $any around
    ! reverse the order of $any
    * - the elements of $any in reverse order
    * ! turn the order of $any around

$any[::$step]
    - every $ordinal element of $any
    - every $ordinal of $any
    - every $ordinal entry of $any
    - $any in steps of $step
    ! take every $ordinal element of $any
    ! keep every $ordinal of $any
    ! pick each $ordinal element of $any
    * ! take every $ordinal entry of $any
    * - each $ordinal element of $any

set($any)
    - the distinct elements of $any
    - the unique elements of $any
    - the set of $any
    - $any without duplicates
    - the different values in $any
    ! remove duplicates from $any
    ! drop the duplicates in $any
    * - the unique values in $any
    * ! make a set of $any

len(set($any))
    - the number of distinct elements in $any
    - the number of unique values in $any
    ~ how many different values $any has
    ! count the distinct values in $any
    ! count the unique elements of $any
    = how many different elements are in $any?
    = how many unique values are in $any?
    * ! count the different values in $any
    * - the number of different elements in $any

list(enumerate($any))
    - $any with their positions
    - $any paired with their index
    - a list of index and element for $any
    - the numbered elements of $any
    ! number the elements of $any
    ! enumerate $any
    ! pair every element of $any with its index
    * - the elements of $any with their index
    * ! number $any

dict(zip($words, $nums))
    - a dict from $words to $nums
    - a dictionary with $words as keys and $nums as values
    - a dict that maps $words to $nums
    ! map $words to $nums
    ! make a dict from $words and $nums
    ! build a dictionary of $words to $nums
    ! turn $words and $nums into a dict
    * ! make a dictionary that maps $words to $nums
    * - a dict with keys from $words and values from $nums

list(zip($words, $nums))
    - pairs of $words and $nums
    - a list of pairs from $words and $nums
    - $words paired with $nums
    - $words and $nums zipped
    ! pair $words with $nums
    ! zip $words and $nums
    ! pair up $words and $nums
    * - the pairs of $words with $nums
    * ! zip $words with $nums into pairs

[a + b for a, b in zip($nums, $more)]
    - the sums of $nums and $more, element by element
    - $nums plus $more, element by element
    - the elementwise sum of $nums and $more
    ! add $nums and $more element by element
    ! add $nums to $more elementwise
    ! add up $nums and $more pairwise
    * - the pairwise sums of $nums and $more
    * ! add each of $nums to its partner in $more, element by element

sum(a * b for a, b in zip($nums, $more))
    - the dot product of $nums and $more
    - the sum of products of $nums and $more
    - the scalar product of $nums and $more
    - the inner product of $nums and $more
    ! sum the products of $nums and $more
    ! take the dot product of $nums with $more
    = dot product, $nums and $more
    * - the dot product of the lists $nums and $more
    * ! multiply $nums and $more and sum the products

[x for row in $nested for x in row]
    - $nested flattened
    - all elements of the lists in $nested
    - a flat list of $nested
    - one flat list from $nested
    ! flatten $nested
    ! flatten $nested into one list
    ! turn $nested into a flat list
    * ! flatten the lists in $nested
    * - the flattened list of $nested

not $any
    ? $any is empty
    ? there is nothing in $any
    ? the list $any is empty
    ? nothing is in $any
    ? $any has no elements
    = is $any empty?
    = is there nothing in $any?
    * ? there are no elements in $any
    * = is the list $any empty?

$s.upper()
    - $s in upper case
    - $s in capitals
    - the upper case form of $s
    - $s in capital letters
    ! make $s upper case
    ! convert $s to upper case
    ! put $s in capitals
    = uppercase $s
    * ! turn $s into upper case
    * - $s with all letters in upper case

$s.lower()
    - $s in lower case
    - $s in small letters
    - the lower case form of $s
    - $s without capitals
    ! make $s lower case
    ! convert $s to lower case
    ! put $s in small letters
    = lowercase $s
    * ! turn $s into lower case
    * - $s with all letters in lower case

$s.strip()
    - $s without surrounding spaces
    - $s without whitespace at its ends
    - $s stripped
    - $s without spaces around it
    ! strip $s
    ! remove the spaces around $s
    ! strip whitespace from $s
    ! trim $s
    * ! remove whitespace around $s
    * - $s with the surrounding whitespace stripped

$s.split()
    - the words of $s
    - a list of the words in $s
    - the words in $s
    - the separate words of $s
    ! split $s into words
    ! split $s at spaces
    ! break $s into words
    ! split $s on whitespace
    * - a list of all words in $s
    * ! cut $s into its words

$s.split("$sep")
    - the parts of $s between "$sep"
    - $s split at "$sep"
    - the pieces of $s separated by "$sep"
    ! split $s at "$sep"
    ! split $s on "$sep"
    ! break $s at every "$sep"
    ! cut $s at "$sep"
    ! split $s by "$sep"
    * ! split $s at each "$sep"
    * - the parts of $s separated by "$sep"

$s.splitlines()
    - the lines of $s
    - a list of the lines in $s
    - the lines in $s
    - the separate lines of $s
    ! split $s into lines
    ! break $s into lines
    ! split $s at line ends
    * - a list of all lines in $s
    * ! cut $s into its lines

"$sep".join($words)
    - $words joined with "$sep"
    - $words joined by "$sep"
    - one string of $words with "$sep" between them
    - $words separated by "$sep"
    ! join $words with "$sep"
    ! join $words by "$sep"
    ! glue $words together with "$sep"
    ! put "$sep" between $words
    * ! join all $words with "$sep" between them
    * - a string of $words joined with "$sep"

$s.replace("$ch", "$sep")
    - $s with "$ch" replaced by "$sep"
    - $s with every "$ch" turned into "$sep"
    - $s with "$sep" instead of "$ch"
    ! replace "$ch" with "$sep" in $s
    ! replace every "$ch" in $s by "$sep"
    ! change "$ch" to "$sep" in $s
    ! turn each "$ch" in $s into "$sep"
    * ! replace each "$ch" in $s with "$sep"
    * ! change every "$ch" in $s to "$sep"

$s.startswith("$lit")
    ? $s starts with "$lit"
    ? $s begins with "$lit"
    ? "$lit" is at the start of $s
    ? the start of $s is "$lit"
    ? $s has the prefix "$lit"
    = does $s start with "$lit"?
    = does $s begin with "$lit"?
    * ? the beginning of $s is "$lit"
    * = is "$lit" what $s starts with?

$s.endswith("$lit")
    ? $s ends with "$lit"
    ? $s ends in "$lit"
    ? "$lit" is at the end of $s
    ? the end of $s is "$lit"
    ? $s has the suffix "$lit"
    = does $s end with "$lit"?
    = does $s end in "$lit"?
    * ? the string $s ends with "$lit"
    * = is "$lit" what $s ends with?

"$lit" in $s
    ? $s contains "$lit"
    ? "$lit" is in $s
    ? "$lit" occurs in $s
    ? "$lit" is somewhere in $s
    ? the string $s contains "$lit"
    = does $s contain "$lit"?
    = is "$lit" in $s?
    * ? "$lit" occurs anywhere in $s
    * = is "$lit" contained in $s?

$s.count("$ch")
    ~ how often "$ch" occurs in $s
    - the number of times "$ch" is in $s
    - the number of "$ch" in $s
    ! count "$ch" in $s
    ! count every "$ch" in $s
    ! count how often "$ch" is in $s
    = how many "$ch" are in $s?
    * ! count the times "$ch" occurs in $s
    * = how often does "$ch" occur in $s?

$s == $s[::-1]
    ? $s is a palindrome
    ? $s reads the same backwards
    ? $s is the same forwards and backwards
    ? $s equals its reverse
    = is $s a palindrome?
    = does $s read the same in reverse?
    = palindrome test for $s
    * ? the string $s is a palindrome
    * = does $s read the same backwards and forwards?

$s.isdigit()
    ? $s has only digits
    ? $s consists of digits
    ? all characters of $s are digits
    ? $s is made of digits only
    ? every character in $s is a digit
    = is $s all digits?
    = does $s consist of digits only?
    * ? there are only digits in $s
    * = are all characters in $s digits?

[x.upper() for x in $words]
    - $words, each in upper case
    - every one of $words in upper case
    - the upper case forms of $words
    ! make all $words upper case
    ! convert each of $words to upper case
    ! put every string in $words in capitals
    ! uppercase all $words
    * ! turn every one of $words into upper case
    * - all $words in upper case

[x.strip() for x in $words]
    - $words, each stripped
    - every one of $words without surrounding spaces
    - all $words stripped
    ! strip every string in $words
    ! strip all $words
    ! strip whitespace from each of $words
    ! remove the spaces around each of $words
    * ! strip each of $words
    * ! remove whitespace around every one of $words

[len(x) for x in $words]
    - the lengths of $words
    - the length of each of $words
    - the length of every string in $words
    - a list of the lengths of $words
    ! measure the length of every one of $words
    ! take the length of each string in $words
    = how long is each of $words?
    * - the length of every one of $words
    * ! list the lengths of all $words

[x for x in $words if len(x) > $n]
    - those of $words longer than $n characters
    - all $words longer than $n
    - the strings in $words with more than $n characters
    - $words that are longer than $n letters
    ! keep $words longer than $n characters
    ! filter $words to those longer than $n
    = which of $words are longer than $n characters?
    * - the strings in $words longer than $n characters
    * ! select $words with more than $n letters

[x for x in $words if x.startswith("$ch")]
    - those of $words that start with "$ch"
    - all $words beginning with "$ch"
    - the strings in $words that begin with "$ch"
    - $words starting with "$ch"
    ! keep $words that start with "$ch"
    ! filter $words to those that begin with "$ch"
    = which of $words start with "$ch"?
    * - the strings in $words that start with "$ch"
    * ! select $words that begin with "$ch"

[x for x in $words if "$lit" in x]
    - those of $words that contain "$lit"
    - all $words containing "$lit"
    - the strings in $words with "$lit" in them
    - $words that contain "$lit"
    ! keep $words that contain "$lit"
    ! filter $words to those with "$lit"
    = which of $words contain "$lit"?
    * - the strings in $words that contain "$lit"
    * ! select $words with "$lit" in them

[x for x in $words if x]
    - $words without the empty ones
    - those of $words that are not empty
    - the strings in $words that are not empty
    ! drop the empty strings from $words
    ! remove empty $words
    ! keep $words that are not empty
    ! leave out empty strings in $words
    * ! remove the empty strings in $words
    * - all $words that are not empty

sorted($words, key=len)
    - $words sorted by length
    - $words ordered by their length
    - $words by length
    - $words from shortest to longest
    ! sort $words by length
    ! order $words by length
    ! sort $words by how long they are
    = $words, shortest first
    * ! put $words in order of length
    * - the strings in $words sorted by length

max($words, key=len)
    - the longest of $words
    - the longest string in $words
    - the longest one of $words
    - the one of $words with the greatest length
    ! pick the longest of $words
    = which of $words is the longest?
    = longest in $words
    * - the string in $words that is longest
    * ! choose the longest of $words

min($words, key=len)
    - the shortest of $words
    - the shortest string in $words
    - the shortest one of $words
    - the one of $words with the least length
    ! pick the shortest of $words
    = which of $words is the shortest?
    = shortest in $words
    * - the string in $words that is shortest
    * ! choose the shortest of $words

[int(x) for x in $words]
    - $words as integers
    - the integers in the strings $words
    - $words, each as an int
    - a list of integers from $words
    ! convert $words to integers
    ! turn every one of $words into an int
    ! parse $words as integers
    * ! convert each of $words to an int
    * - every one of $words as an integer

int($s)
    - $s as an integer
    - the integer in $s
    - $s as an int
    - the integer that $s stands for
    ! convert $s to an integer
    ! turn $s into an int
    ! parse $s as an integer
    * ! convert the string $s to an int
    * - the string $s as an integer

list($d)
    - the keys of $d
    - a list of the keys in $d
    - all keys of the dict $d
    - every key in $d
    ! list the keys of $d
    ! list all keys in $d
    = which keys does $d have?
    * - a list of all keys of $d
    * ! collect the keys of $d in a list

list($d.values())
    - the values of $d
    - a list of the values in $d
    - all values of the dict $d
    - every value in $d
    ! list the values of $d
    ! list all values in $d
    = which values does $d have?
    * - a list of all values of $d
    * ! collect the values of $d in a list

$d["$key"]
    - the value of "$key" in $d
    - the entry for "$key" in $d
    ~ what $d has under "$key"
    - the value under "$key" in $d
    ! look up "$key" in $d
    ! read "$key" from $d
    = value for "$key" in $d
    * - the value that $d has for "$key"
    * ! look up the value of "$key" in $d

$d.get("$key", $n)
    - the value of "$key" in $d, or $n if missing
    - "$key" from $d with a default of $n
    - the entry for "$key" in $d, else $n
    - $d at "$key", $n by default
    ! look up "$key" in $d, falling back to $n
    ! get "$key" from $d with default $n
    ! read "$key" from $d, or $n when it is missing
    * ! look up "$key" in $d with a default of $n
    * - the value under "$key" in $d, or $n when missing

"$key" in $d
    ? "$key" is a key of $d
    ? $d has the key "$key"
    ? the dict $d has a key "$key"
    ? there is a key "$key" in $d
    ? "$key" is among the keys of $d
    = does $d have the key "$key"?
    = is "$key" a key of $d?
    * ? "$key" is one of the keys of $d
    * = is there a key "$key" in $d?

max($d, key=$d.get)
    - the key of $d with the largest value
    - the key with the highest value in $d
    - the key in $d that has the biggest value
    - the key with the maximum value in $d
    ! pick the key of $d with the largest value
    = which key of $d has the highest value?
    = which key has the largest value in $d?
    * - the key in $d with the largest value
    * = which key in $d has the biggest value?

sorted($d, key=$d.get)
    - the keys of $d sorted by value
    - the keys of $d ordered by their values
    - the keys in $d by value
    ! sort the keys of $d by value
    ! sort the keys of $d by their values
    ! order the keys in $d by value
    = keys of $d, lowest value first
    * ! order the keys of $d by their values
    * - all keys of $d sorted by their values

sorted($d.items())
    - the items of $d sorted by key
    - the pairs of $d in order of their keys
    - the items of $d in the order of their keys
    ! sort the items of $d by key
    ! sort the pairs in $d by key
    ! order the items of $d by their keys
    * - the sorted items of $d, by key
    * ! sort the items in $d by their keys

{v: k for k, v in $d.items()}
    - $d with keys and values swapped
    - the inverse of the dict $d
    - $d inverted
    - a dict from the values of $d to its keys
    ! swap keys and values of $d
    ! invert the dict $d
    ! exchange the keys and values in $d
    * ! swap the keys and values in $d
    * - the inverted dict $d

sum($d.values())
    - the sum of the values of $d
    - the total of all values in $d
    - the sum of all values in $d
    ! add up the values of $d
    ! sum the values in $d
    ! add all values of $d together
    = what do the values of $d add up to?
    * - the total of the values of $d
    * ! add up all the values in $d

{k: v for k, v in $d.items() if v > $big}
    - the entries of $d with a value above $big
    - the part of $d with values over $big
    - the entries of $d whose value is greater than $big
    ! keep the entries of $d with values above $big
    ! filter $d to values over $big
    ! keep the items of $d whose value is greater than $big
    = which entries of $d have a value over $big?
    * ! filter $d to the entries with a value above $big
    * - the items in $d whose value is over $big

{x: len(x) for x in $words}
    - a dict from $words to their lengths
    - a dictionary of $words and their lengths
    - a dict with the length of each of $words
    ! map each of $words to its length
    ! map every string in $words to its length
    ! make a dict of $words and their lengths
    * ! map all $words to their lengths
    * - a dictionary with the length of every one of $words

{**$d, **$e}
    - $d and $e merged
    - $d updated with $e
    - a dict with the entries of $d and $e
    - $d combined with $e
    ! merge $d and $e
    ! merge $d with $e
    ! combine the dicts $d and $e
    * ! merge the dicts $d and $e
    * - one dict that combines $d and $e

$set & $other
    ~ what is in both $set and $other
    - the intersection of $set and $other
    - the elements common to $set and $other
    - the elements of $set that are also in $other
    ! intersect $set with $other
    = what do $set and $other have in common?
    = in $set and in $other
    * - the elements in both $set and $other
    * - the common elements of $set and $other

$set | $other
    - the union of $set and $other
    - everything in $set or $other
    - all elements of $set and $other together
    - the elements in $set or in $other
    ! unite $set and $other
    ! combine the sets $set and $other
    = in $set or in $other
    * - the union of the sets $set and $other
    * - everything that is in $set or in $other

$set - $other
    ~ what is in $set but not in $other
    - the difference of $set and $other
    - $set without $other
    - the elements of $set that are not in $other
    ! remove $other from $set
    ! subtract $other from $set
    = in $set but not in $other
    * - everything in $set that is not in $other
    * - the elements in $set but not in $other

$set <= $other
    ? $set is a subset of $other
    ? $other contains all of $set
    ? all of $set is in $other
    ? every element of $set is in $other
    ? $set lies within $other
    = is $set a subset of $other?
    = is all of $set in $other?
    * ? the set $set is a subset of $other
    * = is every element of $set also in $other?

[$obj.$attr for $obj in $objs]
    - the $attr of each of $objs
    - the $attr of every $obj in $objs
    - a list of the $attr of all $objs
    - every $obj's $attr from $objs
    ! collect the $attr of each $obj in $objs
    ! take the $attr of every one of $objs
    ! list the $attr of each $obj in $objs
    * - the $attr of each $obj in $objs
    * ! collect the $attr of all $objs

sorted($objs, key=lambda $obj: $obj.$attr)
    - $objs sorted by $attr
    - $objs in order of $attr
    - $objs ordered by their $attr
    - $objs by $attr
    ! sort $objs by $attr
    ! sort the $objs by their $attr
    ! order $objs by $attr
    * ! put $objs in order of their $attr
    * - the $objs sorted by their $attr

max($objs, key=lambda $obj: $obj.$attr)
    - the $obj with the highest $attr in $objs
    - the one of $objs with the largest $attr
    - the $obj in $objs that has the greatest $attr
    - the $obj with the maximum $attr among $objs
    ! pick the $obj with the largest $attr from $objs
    = which of $objs has the highest $attr?
    = which $obj in $objs has the largest $attr?
    * - the $obj in $objs with the largest $attr
    * = which one of $objs has the greatest $attr?

sum($obj.$attr for $obj in $objs)
    - the total $attr of $objs
    - the sum of the $attr of all $objs
    - the total $attr of all $objs
    - the $attr of all $objs added up
    ! add up the $attr of $objs
    ! sum the $attr of every $obj in $objs
    = what is the $attr of all $objs in total?
    * ! add up the $attr of each $obj in $objs
    * - the sum of $attr over all $objs

[$obj for $obj in $objs if $obj.$attr > $big]
    - those of $objs with $attr above $big
    - the $objs whose $attr is over $big
    - all $objs with $attr greater than $big
    - every $obj in $objs whose $attr is above $big
    ! keep $objs with $attr over $big
    ! filter $objs to those with $attr above $big
    = which of $objs have $attr over $big?
    * - the $objs with $attr greater than $big
    * ! keep every $obj in $objs whose $attr is over $big

[$obj for $obj in $objs if $obj.$flag]
    - those of $objs that are $flag
    - the $objs that are $flag
    - only the $flag ones of $objs
    - every $flag $obj in $objs
    ! keep $objs that are $flag
    ! filter $objs to the $flag ones
    = which of $objs are $flag?
    * - every $obj in $objs that is $flag
    * ! select the $flag ones of $objs

all($obj.$flag for $obj in $objs)
    ? all $objs are $flag
    ? every $obj in $objs is $flag
    ? each of $objs is $flag
    ? all of $objs are $flag
    = are all $objs $flag?
    = is every one of $objs $flag?
    = is every $obj in $objs $flag?
    * ? every one of $objs is $flag
    * = are all of $objs $flag?

any($obj.$flag for $obj in $objs)
    ? any of $objs is $flag
    ? some $obj in $objs is $flag
    ? there is a $flag $obj in $objs
    ? at least one of $objs is $flag
    = is any of $objs $flag?
    = is some $obj in $objs $flag?
    = is there a $flag $obj in $objs?
    * ? at least one $obj in $objs is $flag
    * = is any $obj in $objs $flag?

[$fn(x) for x in $any]
    - $fn of every element of $any
    - $fn applied to each of $any
    - the result of $fn for every element of $any
    ! apply $fn to every element of $any
    ! call $fn on each of $any
    ! run $fn over $any
    ! apply $fn to each of $any
    * ! call $fn on every element of $any
    * - the results of $fn for each of $any

[x for x in $any if x is not None]
    - $any without None
    - those of $any that are not None
    - the elements of $any that are not None
    ! remove None from $any
    ! drop every None from $any
    ! keep what is not None in $any
    ! filter out None from $any
    * ! remove every None in $any
    * - all elements of $any other than None

[x for x in $items if x not in $others]
    - the elements of $items that are not in $others
    - those of $items that are missing from $others
    - the elements of $items missing in $others
    ! keep the elements of $items that are not in $others
    ! drop from the list $items what is in $others
    ! filter out of $items all that is in $others
    = which elements of $items are not in $others?
    * - all elements of $items that are missing from $others
    * ! keep only what is not in $others from the list $items

[i for i, x in enumerate($nums) if x == $n]
    - the positions of $n in $nums
    - the indices where $nums is $n
    - every index of $n in $nums
    - all positions of $n in $nums
    ! list the positions of $n in $nums
    ! list the indices of $n in $nums
    = at which positions is $n in $nums?
    * - all indices of $n in $nums
    * ! list every position of $n in $nums

$v if $v > $w else $w
    - the larger of $v and $w
    - the greater of $v and $w
    ~ whichever of $v and $w is larger
    - $v or $w, whichever is greater
    ! pick the larger of $v and $w
    = which is larger, $v or $w?
    * - the larger of the two, $v and $w
    * ! choose the greater of $v and $w

"$lit" if $v > $big else "$lit2"
    - "$lit" if $v is above $big, otherwise "$lit2"
    - "$lit" if $v is greater than $big, else "$lit2"
    - "$lit" when $v is over $big, otherwise "$lit2"
    - "$lit" for $v above $big and "$lit2" otherwise
    ! say "$lit" when $v is greater than $big, else "$lit2"
    ! use "$lit" if $v is over $big, otherwise "$lit2"
    * - "$lit" when $v is above $big, else "$lit2"
    * ! say "$lit" if $v is over $big and "$lit2" otherwise

$v % 2 == 0
    ? $v is even
    ? $v is an even number
    ? the number $v is even
    ? $v is divisible by two
    = is $v even?
    = is $v an even number?
    * ? the value of $v is even
    * = is the number $v even?

$big <= $v <= $bigger
    ? $v is between $big and $bigger
    ? $v lies between $big and $bigger
    ? $v is in the range from $big to $bigger
    ? $v is at least $big and at most $bigger
    = is $v between $big and $bigger?
    = does $v lie between $big and $bigger?
    * ? the value of $v is between $big and $bigger
    * = is $v in the range $big to $bigger?

round($v, $n)
    - $v rounded to $n digits
    - $v rounded to $n decimal places
    - $v to $n decimal places
    ! round $v to $n digits
    ! round $v to $n decimals
    ! round $v to $n places
    * ! round the number $v to $n digits
    * - the value of $v rounded to $n decimals

$v is None
    ? $v is None
    ? $v is set to None
    ? $v has the value None
    ? there is None in $v
    = is $v None?
    = is the value of $v None?
    * ? the value of $v is None
    * = is $v equal to None?

isinstance($v, int)
    ? $v is an int
    ? $v is an integer
    ? $v is of type int
    ? the type of $v is int
    = is $v an int?
    = is $v an integer?
    * ? $v has the type int
    * = is $v of type int?

list(range($big))
    - the integers from 0 to just below $big
    - a list of the numbers below $big, from 0
    - the first $big numbers from 0
    - $big numbers counted from 0
    - a range of $big as a list
    ! list the first $big integers from 0
    ! count $big numbers from 0
    * - the first $big integers counted from 0
    * ! list the integers from 0 to just below $big

[0] * $big
    - a list of $big zeros
    - $big zeros in a list
    - a list with $big zeros
    - a list of zeros of length $big
    ! make a list of $big zeros
    ! fill a list with $big zeros
    * ! create a list with $big zeros
    * - a list that has $big zeros

math.sqrt($v)
    - the square root of $v
    - the square root of the number $v
    - the root of $v
    ! take the square root of $v
    ! compute the root of $v
    = square root of $v
    * ! calculate the square root of $v
    * - the square root of the value $v

random.choice($any)
    - a random element of $any
    - a random one of $any
    - one of $any at random
    - any element of $any, at random
    ! pick a random element of $any
    ! choose one of $any at random
    ! draw a random element from $any
    * ! choose a random element of $any
    * - an element of $any at random

random.randint(1, $big)
    - a random integer from 1 to $big
    - a random number between 1 and $big
    - a random whole number from 1 to $big
    ! pick a random number between 1 and $big
    ! draw a random integer from 1 to $big
    ! choose a random number from 1 to $big
    * ! draw a random number between 1 and $big
    * - a random integer between 1 and $big

Counter($any)
    ~ how often each element of $any occurs
    - the counts of each element in $any
    - the frequencies of $any
    - the number of times each of $any occurs
    ! count each element of $any
    ! count how often each of $any occurs
    = how often does each element of $any occur?
    * - the frequency of each element of $any
    * ! count how often each element in $any occurs

Counter($any).most_common($n)
    - the $n most common elements of $any
    - the $n most frequent of $any
    - the top $n of $any by frequency
    - the $n most common of $any
    ! list the $n most common elements of $any
    = which $n elements of $any are most common?
    = top $n most frequent in $any
    * - the $n most frequent elements of $any
    * ! list the $n most common of $any

os.path.join($dir, $file)
    - the path of $file in $dir
    - the path to $file inside $dir
    - $dir and $file joined to a path
    - the full path of $file in $dir
    ! join $dir and $file to a path
    ! build the path of $file in $dir
    * ! build a path from $dir and $file
    * - the full path to $file inside $dir

os.path.exists($path)
    ? $path exists
    ? the file $path exists
    ? there is a file at $path
    ? something exists at $path
    = does $path exist?
    = does the file $path exist?
    * ? a file exists at $path
    * = is there a file at $path?

os.path.getsize($path)
    - the size of the file $path
    - the size of $path in bytes
    - the file size of $path
    ~ how many bytes $path has
    = how large is the file $path?
    = how many bytes does $path have?
    * - the size in bytes of the file $path
    * = how many bytes has the file $path?

os.listdir($dir)
    - the files in $dir
    - the names of the files in $dir
    ~ what is in the directory $dir
    - the contents of the directory $dir
    ! list the files in $dir
    ! list the directory $dir
    * ! list what is in the directory $dir
    * - a list of the files in $dir

Path($path).read_text()
    - the contents of the file $path
    - the text in the file $path
    - the text of $path
    - everything in the file $path as text
    ! read the file $path
    ! read the text of $path
    ! read $path as text
    * ! read all text from the file $path
    * - the whole text of the file $path

Path($path).suffix
    - the extension of $path
    - the file extension of $path
    - the suffix of $path
    - the suffix of the file $path
    = which extension does $path have?
    = file extension of $path
    * - the extension of the file $path
    * = what suffix does $path have?

Path($path).name
    - the file name of $path
    - the last part of the path $path
    - the base name of $path
    - the name of the file at $path
    - $path without its directory
    = file name in $path
    * - the file name at the end of $path
    * - the base name of the file at $path

Path($path).parent
    - the directory of $path
    - the directory that $path is in
    - the parent directory of $path
    - the folder that contains $path
    = which directory is $path in?
    = parent folder of $path
    * - the directory that contains $path
    * - the folder that $path is in

re.findall(r"\\d+", $s)
    - all numbers in $s
    - the numbers that occur in $s
    - every number in $s
    - all runs of digits in $s
    ! find all numbers in $s
    ! extract the numbers from $s
    ! extract the runs of digits from $s
    * ! extract every number in $s
    * - the runs of digits that occur in $s

re.sub(r"\\s+", " ", $s)
    - $s with runs of whitespace replaced by a space
    - $s with single spaces
    - $s with every run of spaces made one
    ! collapse whitespace in $s
    ! collapse the spaces in $s
    ! replace runs of whitespace in $s by one space
    ! squeeze the whitespace in $s
    * ! collapse runs of whitespace in $s
    * - $s with the whitespace collapsed

json.loads($s)
    - the JSON in $s, parsed
    - the value of the JSON string $s
    - $s parsed as JSON
    ! parse $s as JSON
    ! parse the JSON in $s
    ! decode the JSON string $s
    ! load the JSON from $s
    * ! decode $s as JSON
    * - the parsed JSON of $s

json.dumps($d)
    - $d as JSON
    - the JSON for $d
    - $d as a JSON string
    - the dict $d in JSON
    ! convert $d to JSON
    ! turn $d into JSON
    ! write $d as a JSON string
    * ! encode $d as JSON
    * - a JSON string of $d

datetime.now()
    - the current date and time
    - the current time
    - the date and time right now
    - now as a datetime
    = what time is it?
    = what is the time now?
    * - the present date and time
    * = what time is it now?

($end - $day).days
    - the number of days from $day to $end
    - the days between $day and $end
    ~ how many days lie between $day and $end
    - the difference between $day and $end in days
    ! count the days from $day to $end
    = how many days are there from $day to $end?
    * ! count the days between $day and $end
    * = how many days are between $day and $end?

$day + timedelta(days=$n)
    - the date $n days after $day
    - $day plus $n days
    - the day $n days after $day
    - $n days after $day
    ! add $n days to $day
    ! move $day forward by $n days
    = $n days later than $day
    * - the date that is $n days after $day
    * ! move $day $n days forward

$day.strftime("%Y-%m-%d")
    - $day as year, month and day
    - $day in the form year-month-day
    - $day as a string like 2024-05-17
    ! format $day as year-month-day
    ! format $day as YYYY-MM-DD
    ! write $day as YYYY-MM-DD
    = $day as YYYY-MM-DD
    * ! write $day in the form year-month-day
    * - $day in the format YYYY-MM-DD
"""


class Way(NamedTuple):
    """A way to ask: its kind (which frames fit), its words, and whether it is kept for the test."""

    kind: str
    words: str
    is_test: bool


class Intent(NamedTuple):
    """An expression and the ways to ask for it."""

    expression: str
    ways: list[Way]


def table(text: str, separator: str | None = None) -> dict[str, list[str]]:
    """Lines of a name and its values; lines of the same name add up."""
    found: dict[str, list[str]] = {}
    for line in text.strip().splitlines():
        name, *values = (part.strip() for part in line.split(separator))
        found.setdefault(name, []).extend(values)
    return found


def parse(text: str) -> list[Intent]:
    """The intents written above."""
    intents = []
    for block in text.strip().split("\n\n"):
        expression, *lines = block.split("\n")
        ways = []
        for line in lines:
            is_test, kind, words = re.fullmatch(r" {4}(\* )?([-!?~=]) (.+)", line).groups()  # type: ignore[union-attr]
            ways.append(Way(kind, words, bool(is_test)))
        intents.append(Intent(expression, ways))
    return intents


def slots_of(template: str) -> set[str]:
    """The slots in a template."""
    return {named or braced for named, braced in re.findall(r"\$(?:(\w+)|\{(\w+)\})", template)}


def fill(names: set[str], slots: dict[str, list[str]], rng: random.Random) -> dict[str, str]:
    """A value for every slot, no value twice: two lists in one request have different names."""
    values: dict[str, str] = {}
    for name in sorted(names - {"obj", "ordinal"}):
        values[name] = rng.choice([value for value in slots[name] if value not in values.values()])
    if "objs" in values:
        values["obj"] = values["objs"].removesuffix("s")
    if "step" in values:
        values["ordinal"] = ORDINALS[values["step"]]
    return values


class Writer:
    """Makes rows; its draws depend on the seed and on what it made before."""

    def __init__(self) -> None:
        self.rng = random.Random(SEED)
        self.frames, self.slots = table(FRAMES, " | "), table(SLOTS)

    def row(self, intent: Intent, way: Way) -> dict[str, str]:
        """A request and its expression."""
        values = fill(slots_of(intent.expression) | slots_of(way.words), self.slots, self.rng)
        words = Template(way.words).substitute(values)
        prompt = Template(self.rng.choice(self.frames[way.kind])).substitute(way=words)
        completion = Template(intent.expression).substitute(values)
        return {"prompt": prompt, "completion": completion, "split": "test" if way.is_test else "train"}

    def rows(self, intents: list[Intent], count: int, is_test: bool) -> list[dict[str, str]]:
        """``count`` rows with different prompts, intents and their ways in turn."""
        found: dict[str, dict[str, str]] = {}
        turn = 0
        while len(found) < count:
            intent = intents[turn % len(intents)]
            ways = [way for way in intent.ways if way.is_test == is_test]
            made = self.row(intent, ways[turn // len(intents) % len(ways)])
            found.setdefault(made["prompt"], made)
            turn += 1
        return list(found.values())


def check(intents: list[Intent], written: list[dict[str, str]]) -> None:
    """What the example promises: test ways are not training ways, no prompt twice, every completion an expression."""
    bare = [(re.sub(r"\$(\w+|\{\w+\})", "$", way.words), way.is_test) for intent in intents for way in intent.ways]
    assert not {words for words, is_test in bare if is_test} & {words for words, is_test in bare if not is_test}
    assert len({made["prompt"].casefold() for made in written}) == len(written)
    for made in written:
        compile(made["completion"], made["prompt"], mode="eval")


def main() -> None:
    intents = parse(INTENTS)
    writer = Writer()
    written = writer.rows(intents, TRAIN_ROWS, is_test=False) + writer.rows(intents, TEST_ROWS, is_test=True)
    check(intents, written)
    DESTINATION.write_text("".join(json.dumps(made) + "\n" for made in written), encoding="utf-8")
    ways = sum(len(intent.ways) for intent in intents)
    print(f"{len(intents)} intents, {ways} ways to ask, {len(written)} rows: {DESTINATION}")


if __name__ == "__main__":
    main()
