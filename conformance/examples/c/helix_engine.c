/* An engine for helix-conformance in one file of C: the placement, lengths and pages of one rank.

   Build and run:

       cc -O2 -o helix_engine helix_engine.c
       helix-conformance run --engine stdio:./helix_engine

   It speaks the protocol of PROTOCOL.md: one JSON object a line in, one a line out. It knows every
   layout and both page policies. It declares `placement`, `lengths` and `pages`, and nothing more:
   it has no cache and no attention, and whatever needs a feature it answers with `unsupported`.

   To write an adapter for an engine of yours, keep parts 1 and 5 (reading and answering) and put
   calls to your engine in place of parts 3 and 4. What the words mean is in SPEC.md. */

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void die(const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vfprintf(stderr, format, values); /* the suite shows the end of stderr when an engine fails */
    va_end(values);
    fputc('\n', stderr);
    exit(1);
}

static void *room_for(void *old, size_t count, size_t size)
{
    void *room = realloc(old, count * size + 1);
    if (room == NULL)
        die("Out of memory.");
    return room;
}

/* ---- Part 1: reading JSON ------------------------------------------------------------------- */

typedef enum { NOTHING, TRUTH, NUMBER, TEXT, LIST, OBJECT } Kind;

typedef struct Json {
    Kind kind;
    double number;     /* of a NUMBER; of a TRUTH 0 or 1. Request ids go to 2^53: all are exact. */
    char *text;        /* of a TEXT, as it stands in the line: the suite escapes nothing we read */
    char *key;         /* of a member of an OBJECT */
    struct Json *next; /* the member after this one */
    struct Json *first;
} Json;

static char *at;              /* where the reader is */
static Json **nodes;          /* all values of the present line, to be freed together */
static size_t node_count, node_room;

static Json *new_node(Kind kind)
{
    if (node_count == node_room) {
        size_t more = node_room ? 2 * node_room : 64;
        nodes = room_for(nodes, more, sizeof *nodes);
        for (; node_room < more; node_room++)
            nodes[node_room] = room_for(NULL, 1, sizeof **nodes);
    }
    Json *node = nodes[node_count++];
    memset(node, 0, sizeof *node);
    node->kind = kind;
    return node;
}

static char next_mark(void)
{
    at += strspn(at, " \t\r\n");
    return *at;
}

static void expect(char mark)
{
    if (next_mark() != mark)
        die("Expected '%c' in a message, and found: %.40s", mark, at);
    at++;
}

static char *read_text(void)
{
    expect('"');
    char *text = at;
    while (*at != '"') {
        if (*at == '\\' && at[1] != '\0')
            at++;
        if (*at == '\0')
            die("A text in a message does not end.");
        at++;
    }
    *at++ = '\0';
    return text;
}

static bool read_word(const char *word)
{
    size_t length = strlen(word);
    if (strncmp(at, word, length) != 0)
        return false;
    at += length;
    return true;
}

static Json *read_value(void);

static Json *read_members(Json *parent, char end)
{
    Json **link = &parent->first;
    at++;
    while (next_mark() != end) {
        if (parent->first != NULL)
            expect(',');
        char *key = NULL;
        if (parent->kind == OBJECT) {
            key = read_text();
            expect(':');
        }
        *link = read_value();
        (*link)->key = key;
        link = &(*link)->next;
    }
    at++;
    return parent;
}

static Json *read_value(void)
{
    Json *node;
    switch (next_mark()) {
    case '{':
        return read_members(new_node(OBJECT), '}');
    case '[':
        return read_members(new_node(LIST), ']');
    case '"':
        node = new_node(TEXT);
        node->text = read_text();
        return node;
    }
    if (read_word("null"))
        return new_node(NOTHING);
    bool truth = read_word("true");
    if (truth || read_word("false")) {
        node = new_node(TRUTH);
        node->number = truth;
        return node;
    }
    char *end;
    node = new_node(NUMBER);
    node->number = strtod(at, &end);
    if (end == at)
        die("Expected a value in a message, and found: %.40s", at);
    at = end;
    return node;
}

/* The member of an object; NULL when it is not there, or null. */
static Json *find(const Json *object, const char *key)
{
    for (Json *member = object->first; member != NULL; member = member->next)
        if (strcmp(member->key, key) == 0)
            return member->kind == NOTHING ? NULL : member;
    return NULL;
}

static Json *get(const Json *object, const char *key)
{
    Json *member = find(object, key);
    if (member == NULL)
        die("A message lacks %s.", key);
    return member;
}

static double real(const Json *object, const char *key) { return get(object, key)->number; }

static long long number(const Json *object, const char *key)
{
    return (long long)real(object, key);
}

static bool says(const Json *object, const char *key, const char *text)
{
    return strcmp(get(object, key)->text, text) == 0;
}

static long long length(const Json *list)
{
    long long count = 0;
    for (Json *member = list->first; member != NULL; member = member->next)
        count++;
    return count;
}

/* ---- Part 2: reasons, in the words of SPEC.md, section 6 ------------------------------------- */

typedef const char *Reason;
#define ACCEPTED NULL

/* ---- Part 3: where tokens belong (SPEC.md, section 3) ---------------------------------------- */

typedef enum { CONTIGUOUS, ROUND_ROBIN, PROMPT_INTERLEAVE } Prompt;
typedef enum { LAST_RANK, STEP, POSITION, OWNER_INTERLEAVE } Owner;

static struct {
    Prompt prompt;
    Owner owner;
    bool lockstep;
    bool rotated;
    long long c;                /* cp_size */
    long long t;                /* tokens_per_block */
    long long prompt_chunk;     /* tokens dealt at a time: t, or the interleave */
    long long owner_chunk;
} layout;

static long long divided_up(long long a, long long b) { return (a + b - 1) / b; }

/* The rank of a prompt's position, before the request's shift. */
static long long prompt_owner(long long position, long long prompt_len)
{
    if (layout.prompt != CONTIGUOUS)
        return position / layout.prompt_chunk % layout.c;
    /* The first `larger` ranks take one block more than the others. */
    long long blocks = divided_up(prompt_len, layout.t), block = position / layout.t;
    long long share = blocks / layout.c, larger = blocks % layout.c;
    long long in_larger = larger * (share + 1);
    if (block < in_larger)
        return block / (share + 1);
    return larger + (block - in_larger) / share;
}

/* The rank of a decoded token, before the request's shift. `step` counts decoded tokens. */
static long long decode_owner(long long prompt_len, long long step)
{
#ifdef PLANTED_DEFECT
    step += 1; /* counts from 1, as an iteration counter does: see the test that catches it */
#endif
    switch (layout.owner) {
    case LAST_RANK:
        return layout.c - 1;
    case STEP:
        return step / layout.t % layout.c;
    default:
        return (prompt_len + step) / layout.owner_chunk % layout.c;
    }
}

/* Pages that a rank with `held` of a request's `total` tokens must have for it. */
static long long pages_for(long long held, long long total)
{
    if (layout.lockstep)
        return divided_up(total, layout.t * layout.c);
    return divided_up(held, layout.t);
}

/* ---- Part 4: the state of this rank, and what changes it ------------------------------------- */

typedef struct {
    long long id;
    long long prompt_len;
    long long total;        /* tokens, prompt and decoded */
    long long shift;        /* of layouts that rotate */
    long long *held;        /* tokens on each cp_rank: all ranks know all of them */
    long long *table;       /* physical pages on this rank, in local order */
    long long pages;        /* entries of `table` */
} Request;

static long long cp_rank, max_len, admissions;
static long long *free_pages;       /* on each cp_rank, so that every rank refuses alike */
static long long *returned;         /* physical pages of this rank that were used and are free */
static long long returned_count, never_used;
static Request *requests;
static long long request_count;

static Request *request_of(long long id)
{
    for (long long i = 0; i < request_count; i++)
        if (requests[i].id == id)
            return &requests[i];
    return NULL;
}

static long long take_page(void)
{
    return returned_count > 0 ? returned[--returned_count] : never_used++;
}

static void give_back(long long page)
{
    returned = room_for(returned, (size_t)(returned_count + 1), sizeof *returned);
    returned[returned_count++] = page;
}

/* The request has these tokens more on one cp_rank. */
static void add_tokens(Request *request, long long owner, long long count)
{
    request->held[(owner + request->shift) % layout.c] += count;
    request->total += count;
}

/* Pages that a request still needs on a cp_rank, when it has `had` of them. */
static long long pages_missing(const Request *request, long long rank, long long had)
{
    return pages_for(request->held[rank], request->total) - had;
}

/* Take what the page policy asks for after tokens were added: on all ranks in the counts of free
   pages, on this one in the block table too. `before[r]` are the pages that rank r had. */
static void take_pages(Request *request, const long long *before)
{
    for (long long rank = 0; rank < layout.c; rank++)
        free_pages[rank] -= pages_missing(request, rank, before[rank]);
    long long wanted = pages_for(request->held[cp_rank], request->total);
    request->table = room_for(request->table, (size_t)wanted, sizeof *request->table);
    while (request->pages < wanted)
        request->table[request->pages++] = take_page();
}

static long long *new_counts(void)
{
    long long *counts = room_for(NULL, (size_t)layout.c, sizeof *counts);
    memset(counts, 0, (size_t)layout.c * sizeof *counts);
    return counts;
}

static Request dealt(long long id, long long prompt_len)
{
    Request request = {.id = id, .prompt_len = prompt_len, .held = new_counts()};
    request.shift = layout.rotated ? admissions % layout.c : 0;
    long long chunk = layout.prompt_chunk;
    for (long long position = 0; position < prompt_len; position += chunk) {
        long long rest = prompt_len - position;
        add_tokens(&request, prompt_owner(position, prompt_len), rest < chunk ? rest : chunk);
    }
    return request;
}

static Reason admit(const Json *event)
{
    long long id = number(event, "id"), prompt_len = number(event, "prompt_len");
    if (request_of(id) != NULL)
        return "duplicate_request";
    if (prompt_len < 1)
        return "empty_prompt";
    if (prompt_len > max_len)
        return "too_long";
    Request request = dealt(id, prompt_len);
    for (long long rank = 0; rank < layout.c; rank++)
        if (pages_missing(&request, rank, 0) > free_pages[rank]) {
            free(request.held);
            return "out_of_pages";
        }
    long long *none = new_counts();
    take_pages(&request, none);
    free(none);
    requests = room_for(requests, (size_t)(request_count + 1), sizeof *requests);
    requests[request_count++] = request;
    admissions++;
    return ACCEPTED;
}

static Reason release(const Json *event)
{
    Request *request = request_of(number(event, "id"));
    if (request == NULL)
        return "unknown_request";
    for (long long rank = 0; rank < layout.c; rank++)
        free_pages[rank] += pages_for(request->held[rank], request->total);
    for (long long page = 0; page < request->pages; page++)
        give_back(request->table[page]);
    free(request->held);
    free(request->table);
    *request = requests[--request_count];
    return ACCEPTED;
}

/* Why a decode is refused, and a skip of the same ids: the first reason that applies, in the order
   of SPEC.md, section 6. Nothing has changed yet. */
static Reason step_refusal(const Json *event)
{
    const Json *ids = get(event, "ids"), *lens = get(event, "query_lens");
    const Json *pad = find(event, "pad"), *one, *other;

    for (one = lens->first; one != NULL; one = one->next)
        if (one->number > 1)
            return "unsupported"; /* needs the profile `speculative` */
    if (pad != NULL && pad->number > 0)
        return "unsupported"; /* needs `padding` */

    if (ids->first == NULL || length(ids) != length(lens) || (pad != NULL && pad->number < 0))
        return "bad_count";
    for (one = lens->first; one != NULL; one = one->next)
        if (one->number < 1)
            return "bad_count";

    for (one = ids->first; one != NULL; one = one->next)
        for (other = one->next; other != NULL; other = other->next)
            if (one->number == other->number)
                return "duplicate_request";
    for (one = ids->first; one != NULL; one = one->next)
        if (request_of((long long)one->number) == NULL)
            return "unknown_request";
    for (one = ids->first; one != NULL; one = one->next)
        if (request_of((long long)one->number)->total >= max_len)
            return "too_long";

    /* The need of the whole batch must fit on every rank. */
    long long *need = new_counts();
    for (one = ids->first; one != NULL; one = one->next) {
        Request *request = request_of((long long)one->number);
        long long step = request->total - request->prompt_len;
        long long owner = (decode_owner(request->prompt_len, step) + request->shift) % layout.c;
        for (long long rank = 0; rank < layout.c; rank++) {
            long long held = request->held[rank];
            need[rank] += pages_for(held + (rank == owner), request->total + 1) -
                          pages_for(held, request->total);
        }
    }
    bool fits = true;
    for (long long rank = 0; rank < layout.c; rank++)
        fits = fits && need[rank] <= free_pages[rank];
    free(need);
    return fits ? ACCEPTED : "out_of_pages";
}

/* What this rank answers about one new token. */
typedef struct {
    long long past_len, position_id, slot;
    bool active;
} NewToken;

static NewToken decoded(Request *request)
{
    NewToken token = {.past_len = request->held[cp_rank], .position_id = request->total};
    long long step = request->total - request->prompt_len;
    long long owner = decode_owner(request->prompt_len, step);
    long long *before = new_counts();
    for (long long rank = 0; rank < layout.c; rank++)
        before[rank] = pages_for(request->held[rank], request->total);
    add_tokens(request, owner, 1);
    take_pages(request, before);
    free(before);
    token.active = (owner + request->shift) % layout.c == cp_rank;
    token.slot = -1;
    if (token.active) {
        long long index = token.past_len; /* local index: earlier tokens on this rank */
        token.slot = request->table[index / layout.t] * layout.t + index % layout.t;
    }
    return token;
}

/* Whether the rules of SPEC.md, section 4, forbid to start with this configuration. */
static bool is_bad(const Json *config, const Json *rule)
{
    const Json *model = get(config, "model"), *pages = get(config, "pages");
    const Json *prompt_i = find(rule, "prompt_interleave"), *owner_i = find(rule, "owner_interleave");
    long long tp = number(config, "tp_size"), t = number(rule, "tokens_per_block");
    long long c = number(rule, "cp_size");
    long long q_heads = number(model, "q_heads"), kv_heads = number(model, "kv_heads");

    if (prompt_i != NULL && t % (long long)prompt_i->number != 0)
        return true;
    if (owner_i != NULL && t % (long long)owner_i->number != 0)
        return true;
    if (says(rule, "pages", "lockstep")) {
        bool in_turn = says(rule, "prompt", "round_robin") && says(rule, "owner", "position");
        bool interleaved = prompt_i != NULL && owner_i != NULL && prompt_i->number == owner_i->number;
        if (!in_turn && !interleaved)
            return true;
    }
    if (length(pages) != c)
        return true;
    for (const Json *pool = pages->first; pool != NULL; pool = pool->next)
        if (pool->number < 1)
            return true;
    if (q_heads % kv_heads != 0 || q_heads % (tp * c) != 0)
        return true;
    const Json *latent = find(model, "latent"); /* of models with MLA */
    if (latent == NULL) {
        if (tp > kv_heads || kv_heads % tp != 0 || number(model, "head_dim") % 2 != 0)
            return true;
    } else if (kv_heads != 1 || number(latent, "latent_dim") % 2 != 0 ||
               number(latent, "rope_dim") % 2 != 0)
        return true;
    return real(model, "rope_base") <= 1 || real(model, "rope_base") >= 1e12;
}

static void forget_everything(void)
{
    for (long long i = 0; i < request_count; i++) {
        free(requests[i].held);
        free(requests[i].table);
    }
    free(free_pages);
    free_pages = NULL;
    request_count = returned_count = never_used = admissions = 0;
}

static Reason start(const Json *message)
{
    const Json *config = get(message, "config"), *rule = get(message, "layout");
    forget_everything();
    if (is_bad(config, rule))
        return "bad_config";

    layout.c = number(rule, "cp_size");
    layout.t = number(rule, "tokens_per_block");
    layout.lockstep = says(rule, "pages", "lockstep");
    layout.rotated = says(rule, "start", "rotated");
    layout.prompt = says(rule, "prompt", "contiguous")    ? CONTIGUOUS
                    : says(rule, "prompt", "round_robin") ? ROUND_ROBIN
                                                          : PROMPT_INTERLEAVE;
    layout.owner = says(rule, "owner", "last_rank")  ? LAST_RANK
                   : says(rule, "owner", "step")     ? STEP
                   : says(rule, "owner", "position") ? POSITION
                                                     : OWNER_INTERLEAVE;
    layout.prompt_chunk = layout.owner_chunk = layout.t;
    if (layout.prompt == PROMPT_INTERLEAVE)
        layout.prompt_chunk = number(rule, "prompt_interleave");
    if (layout.owner == OWNER_INTERLEAVE)
        layout.owner_chunk = number(rule, "owner_interleave");

    cp_rank = number(message, "rank") % layout.c; /* MAP-1: cp varies fastest */
    max_len = number(config, "max_len");
    free_pages = new_counts();
    long long rank = 0;
    for (const Json *pool = get(config, "pages")->first; pool != NULL; pool = pool->next)
        free_pages[rank++] = (long long)pool->number;
    return ACCEPTED;
}

/* ---- Part 5: answering ----------------------------------------------------------------------- */

static void answer_outcome(long long seq, Reason reason)
{
    if (reason == ACCEPTED)
        printf("{\"type\":\"outcome\",\"seq\":%lld}\n", seq);
    else
        printf("{\"type\":\"outcome\",\"seq\":%lld,\"reason\":\"%s\"}\n", seq, reason);
}

#define COLUMN(name, format, value)                                                                \
    do {                                                                                           \
        printf(",\"" name "\":[");                                                                 \
        for (long long i = 0; i < count; i++)                                                      \
            printf("%s" format, i ? "," : "", value);                                              \
        printf("]");                                                                               \
    } while (0)

static void decode(long long seq, const Json *event)
{
    Reason reason = step_refusal(event);
    if (reason != ACCEPTED) {
        answer_outcome(seq, reason);
        return;
    }
    const Json *ids = get(event, "ids");
    NewToken *tokens = room_for(NULL, (size_t)length(ids), sizeof *tokens);
    long long count = 0;
    for (const Json *id = ids->first; id != NULL; id = id->next)
        tokens[count++] = decoded(request_of((long long)id->number));
    printf("{\"type\":\"outcome\",\"seq\":%lld", seq);
    COLUMN("past_len", "%lld", tokens[i].past_len);
    COLUMN("position_ids", "%lld", tokens[i].position_id);
    COLUMN("active", "%s", tokens[i].active ? "true" : "false");
    COLUMN("slots", "%lld", tokens[i].slot);
    printf("}\n");
    free(tokens);
}

static void apply(long long seq, const Json *event)
{
    if (says(event, "event", "admit"))
        answer_outcome(seq, admit(event));
    else if (says(event, "event", "decode"))
        decode(seq, event);
    else if (says(event, "event", "skip")) /* a step that is prepared and never runs */
        answer_outcome(seq, step_refusal(event));
    else if (says(event, "event", "release"))
        answer_outcome(seq, release(event));
    else
        answer_outcome(seq, "unsupported"); /* accept, fork, preempt, resume, sampled, ... */
}

static bool is_asked_for(const Request *request, const Json *ids)
{
    if (ids == NULL)
        return true; /* without ids all live requests are */
    for (const Json *id = ids->first; id != NULL; id = id->next)
        if ((long long)id->number == request->id)
            return true;
    return false;
}

static void observe(long long seq, const Json *ids)
{
    const char *comma = "";
    printf("{\"type\":\"view\",\"seq\":%lld,\"local_len\":{", seq);
    for (long long i = 0; i < request_count; i++)
        if (is_asked_for(&requests[i], ids)) {
            printf("%s\"%lld\":%lld", comma, requests[i].id, requests[i].held[cp_rank]);
            comma = ",";
        }
    comma = "";
    printf("},\"block_tables\":{");
    for (long long i = 0; i < request_count; i++)
        if (is_asked_for(&requests[i], ids)) {
            printf("%s\"%lld\":[", comma, requests[i].id);
            for (long long page = 0; page < requests[i].pages; page++)
                printf("%s%lld", page ? "," : "", requests[i].table[page]);
            printf("]");
            comma = ",";
        }
    printf("},\"free_pages\":%lld}\n", free_pages[cp_rank]);
}

static void answer(const Json *message)
{
    long long seq = number(message, "seq");
    if (says(message, "type", "hello"))
        printf("{\"type\":\"ready\",\"seq\":%lld,\"protocol\":\"helix-engine/1\","
               "\"engine\":\"helix_engine.c\",\"version\":\"1\","
               "\"profiles\":[\"placement\",\"lengths\",\"pages\"],"
               "\"settings\":{\"language\":\"C\"}}\n",
               seq);
    else if (says(message, "type", "start"))
        answer_outcome(seq, start(message));
    else if (says(message, "type", "apply"))
        apply(seq, get(message, "event"));
    else if (says(message, "type", "observe"))
        observe(seq, find(message, "ids"));
    else
        die("There is no message of type %s in helix-engine/1.", get(message, "type")->text);
}

/* The next line of stdin, without its end; NULL when stdin has ended. */
static char *next_line(void)
{
    static char *line;
    static size_t room;
    size_t used = 0;
    for (;;) {
        if (used + 2 > room)
            line = room_for(line, room = 2 * room + 256, 1);
        if (fgets(line + used, (int)(room - used), stdin) == NULL)
            return NULL;
        used += strlen(line + used);
        if (used > 0 && line[used - 1] == '\n')
            return line;
    }
}

int main(void)
{
    while ((at = next_line()) != NULL) {
        node_count = 0;
        answer(read_value());
        fflush(stdout); /* the suite waits for the whole line */
    }
    return 0; /* stdin has ended: the suite has no more to ask */
}
