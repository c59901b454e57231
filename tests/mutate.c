// Mutants of vblk.h, each with one place made worse:
//
//     mutate -l vblk.h      list them: number, line, kind, old -> new text
//     mutate -n N vblk.h    print the file with mutant N in it
//
// Only function bodies below VBLK_IMPLEMENTED are changed. Lines stay where
// they are.
#include <ctype.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST (1u << 20) // bytes of source

enum { NAME, NUMBER, TEXT, SIGN };

typedef struct token {
    int      kind;
    size_t   at, n; // in the source
    unsigned line;
    int      nested; // in how many parentheses and brackets
    bool     body;   // inside a function's braces
    size_t   name;   // of that function: a token
} token;

static char  *source;
static token *tokens;
static size_t size, count;

static long wanted, mutants; // wanted -1: list


// ---- Tokens -----------------------------------------------------------------

static bool is(size_t i, const char *text) {
    return i < count && strlen(text) == tokens[i].n &&
           memcmp(source + tokens[i].at, text, tokens[i].n) == 0;
}

static bool is_one_of(size_t i, const char *const *texts) {
    while (*texts && !is(i, *texts)) {
        texts++;
    }
    return *texts != NULL;
}

// Past the comment, the string or the preprocessor line at `i`; or `i`.
static size_t skip(size_t i) {
    const char *p = source + i;
    size_t line = i;
    while (line > 0 && (source[line - 1] == ' ' || source[line - 1] == '\t')) {
        line--;
    }
    if (p[0] == '/' && p[1] == '*') {
        return (size_t)(strstr(p + 2, "*/") + 2 - source);
    }
    if ((p[0] == '/' && p[1] == '/') ||
        (p[0] == '#' && (line == 0 || source[line - 1] == '\n'))) {
        while (i < size && (source[i] != '\n' || source[i - 1] == '\\')) {
            i++;
        }
        return i;
    }
    if (p[0] == '"' || p[0] == '\'') {
        for (i++; i < size && source[i] != *p; i++) {
            i += source[i] == '\\';
        }
        return i + 1;
    }
    return i;
}

static size_t sign_length(const char *p) {
    static const char *const signs[] = {
        "<<=", ">>=", "...", "<<", ">>", "<=", ">=", "==", "!=", "&&", "||",
        "++",  "--",  "->",  "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=",
        NULL};
    for (int i = 0; signs[i]; i++) {
        if (strncmp(p, signs[i], strlen(signs[i])) == 0) {
            return strlen(signs[i]);
        }
    }
    return 1;
}

static void add_token(int kind, size_t at, size_t end, unsigned line) {
    token t = {kind, at, end - at, line, 0, false, 0};
    tokens[count++] = t;
}

static void tokenise(size_t from) {
    unsigned line = 1;
    for (size_t i = 0; i < from; i++) {
        line += source[i] == '\n';
    }
    for (size_t i = from; i < size;) {
        size_t end = skip(i);
        unsigned char c = (unsigned char)source[i];
        if (end > i) {
            if (c == '"' || c == '\'') {
                add_token(TEXT, i, end, line);
            }
        } else if (isspace(c)) {
            end = i + 1;
        } else if (isalnum(c) || c == '_') {
            end = i;
            while (isalnum((unsigned char)source[end]) || source[end] == '_') {
                end++;
            }
            add_token(isdigit(c) ? NUMBER : NAME, i, end, line);
        } else {
            end = i + sign_length(source + i);
            add_token(SIGN, i, end, line);
        }
        for (; i < end; i++) {
            line += source[i] == '\n';
        }
    }
}

// The token that closes what opens at `i`.
static size_t closing(size_t i) {
    static const char *const opens[] = {"(", "[", "{", NULL};
    static const char *const closes[] = {")", "]", "}", NULL};
    int depth = 0;
    do {
        depth += is_one_of(i, opens);
        depth -= is_one_of(i, closes);
        i++;
    } while (depth > 0 && i < count);
    return i - 1;
}

// Find the bodies of functions.
static void find_bodies(void) {
    size_t name = 0;
    for (size_t i = 1; i < count; i++) {
        if (tokens[i].kind == NAME && is(i + 1, "(") && !name) {
            name = i;
        } else if (is(i, ";") || is(i, "}")) {
            name = 0;
        } else if (is(i, "{")) {
            size_t end = closing(i);
            bool body = is(i - 1, ")");
            int nested = 0;
            for (size_t k = i; k <= end && body; k++) {
                nested -= is(k, ")") || is(k, "]");
                tokens[k].nested = nested;
                tokens[k].body = true;
                tokens[k].name = name;
                nested += is(k, "(") || is(k, "[");
            }
            i = end;
            name = 0;
        }
    }
}


// ---- Mutants ----------------------------------------------------------------

static void print_flat(const char *text, size_t n) {
    size_t shown = 0;
    for (size_t i = 0; i < n && shown < 60; i++) {
        if (!isspace((unsigned char)text[i]) || text[i - 1] != ' ') {
            putchar(text[i] == '\n' ? ' ' : text[i]);
            shown++;
        }
    }
    printf(shown == 60 ? "..." : "");
}

// One more mutant: from token `first` to token `last` the text becomes `text`.
static void mutant(const char *kind, size_t first, size_t last,
                   const char *text) {
    const token *a = &tokens[first], *b = &tokens[last];
    size_t end = b->at + b->n;
    mutants++;
    if (wanted < 0) {
        printf("%ld: line %u: %s: ", mutants, a->line, kind);
        print_flat(source + a->at, end - a->at);
        printf(" -> ");
        print_flat(text, strlen(text));
        printf("\n");
    } else if (mutants == wanted) {
        fwrite(source, 1, a->at, stdout);
        fputs(text, stdout);
        for (unsigned line = a->line; line < b->line && !*text; line++) {
            putchar('\n');
        }
        fwrite(source + end, 1, size - end, stdout);
    }
}

// The source from token `first` to token `last`; to be freed.
static char *text_of(size_t first, size_t last) {
    size_t n = tokens[last].at + tokens[last].n - tokens[first].at;
    char *text = (char *)calloc(n + 1, 1);
    memcpy(text, source + tokens[first].at, n);
    return text;
}

static char *joined(const char *a, const char *b, const char *c) {
    char *text = (char *)calloc(strlen(a) + strlen(b) + strlen(c) + 1, 1);
    return strcat(strcat(strcpy(text, a), b), c);
}

static void mutant_around(const char *kind, size_t first, size_t last,
                          const char *before, const char *after) {
    char *old = text_of(first, last);
    char *text = joined(before, old, after);
    mutant(kind, first, last, text);
    free(old);
    free(text);
}

static void mutate_token(size_t i) {
    static const char *const table[][3] = {
        {"compare", "<", "<="},    {"compare", "<=", "<"},
        {"compare", ">", ">="},    {"compare", ">=", ">"},
        {"compare", "==", "!="},   {"compare", "!=", "=="},
        {"logic", "&&", "||"},     {"logic", "||", "&&"},
        {"negation", "!", ""},     {"constant", "true", "false"},
        {"constant", "false", "true"}};
    for (size_t k = 0; k < sizeof table / sizeof table[0]; k++) {
        if (is(i, table[k][1])) {
            mutant(table[k][0], i, i, table[k][2]);
        }
    }
    if (tokens[i].kind == NUMBER && !(is(i - 1, "{") && is(i + 1, "}"))) {
        mutant_around("constant", i, i, "(", " + 1)");
        if (!is(i, "0")) {
            mutant_around("constant", i, i, "(", " - 1)");
        }
    }
    if (is(i, "if")) {
        size_t end = closing(i + 1);
        mutant_around("check", i + 1, end, "(", ", false)");
        mutant_around("check", i + 1, end, "(", ", true)");
    }
}


// ---- Statements -------------------------------------------------------------

static bool starts_statement(size_t i) {
    if (tokens[i].nested || is(i, "}") || is(i, ";")) {
        return false;
    }
    if (is(i - 1, ":")) {
        return is(i - 2, "default") || is(i - 3, "case");
    }
    if (is(i - 1, "{")) {
        return is(i - 2, ")") || is(i - 2, "else") || is(i - 2, "do");
    }
    return is(i - 1, ";") || (is(i - 1, "}") && !is(i, "else") &&
                              !is(i, ",") && !is(i, "while"));
}

// The last token of the statement at `i`.
static size_t statement_end(size_t i) {
    if (is(i, "if") || is(i, "for") || is(i, "while")) {
        i = closing(closing(i + 1) + 1);
        while (is(i + 1, "else")) {
            i = is(i + 2, "if") ? closing(closing(i + 3) + 1) : closing(i + 2);
        }
        return i;
    }
    while (i + 1 < count && (!is(i, ";") || tokens[i].nested)) {
        i = is(i, "{") ? closing(i) + 1 : i + 1;
    }
    return i;
}

static bool is_declaration(size_t i) {
    return tokens[i].kind == NAME &&
           (tokens[i + 1].kind == NAME ||
            (is(i + 1, "*") && tokens[i + 2].kind == NAME));
}

static void mutate_statement(size_t i) {
    static const char *const fixed[] = {
        "if", "for", "while", "do", "switch", "return", "case", "default",
        NULL};
    static const char *const publish_path[] = {
        "vblk__finish", "vblk__give_back", "vblk__show", "vblk__notify_on",
        "vblk__publish", "vblk__raise", "vblk__poison", "vblk__ask_reset",
        NULL};
    static const char *const barriers[] = {"VBLK__FENCE", "VBLK__ONCE", NULL};
    static const char *const stays[] = {"return", "do", "switch", "case",
                                        "default", "}", NULL};
    size_t end = statement_end(i);
    if (!is_one_of(i, fixed) && !is_declaration(i) &&
        !(is(i, "(") && is(i + 1, "void"))) {
        mutant(is_one_of(i, barriers) ? "barrier" : "statement", i, end - 1,
               "");
    }
    if (is_one_of(tokens[i].name, publish_path) && !is_one_of(i, stays) &&
        !is_one_of(end + 1, stays)) {
        size_t last = statement_end(end + 1);
        char *first = text_of(i, end), *second = text_of(end + 1, last);
        char *both = text_of(i, end + 1);
        size_t gap = tokens[end].at + tokens[end].n - tokens[i].at;
        both[tokens[end + 1].at - tokens[i].at] = 0;
        char *text = joined(second, both + gap, first);
        mutant("swap", i, last, text);
        free(both);
        free(first);
        free(second);
        free(text);
    }
}

static void mutate_all(void) {
    for (size_t i = 3; i + 3 < count; i++) {
        if (is(i, "VBLK_ASSERT")) {
            i = closing(i + 1);
        } else if (tokens[i].body) {
            if (starts_statement(i)) {
                mutate_statement(i);
            }
            mutate_token(i);
        }
    }
}

int main(int argc, char **argv) {
    bool list = argc == 3 && strcmp(argv[1], "-l") == 0;
    bool one = argc == 4 && strcmp(argv[1], "-n") == 0;
    FILE *f = list || one ? fopen(argv[argc - 1], "rb") : NULL;
    const char *from = NULL;
    wanted = one ? strtol(argv[2], NULL, 10) : -1;
    source = (char *)calloc(MOST, 1);
    tokens = (token *)calloc(MOST, sizeof *tokens);
    if (f) {
        size = fread(source, 1, MOST - 1, f);
        from = strstr(source, "#define VBLK_IMPLEMENTED\n");
        fclose(f);
    }
    if (!from) {
        fprintf(stderr, "usage: mutate -l vblk.h | mutate -n N vblk.h\n");
        return 2;
    }
    tokenise((size_t)(from - source));
    find_bodies();
    mutate_all();
    return one && (wanted < 1 || wanted > mutants);
}
